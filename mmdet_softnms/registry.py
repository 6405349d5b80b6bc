"""Registries of the plugin: children of mmdet's, so that ``type='mmdet_softnms.X'`` resolves in any mmdet config.

mmengine imports this module by itself when it meets the scope, and ``locations`` when it looks a name up; no config
needs ``custom_imports``. This is the only module that looks at how the OpenMMLab stack is installed.
"""

try:
    import mmcv
    import mmdet.registry
    from mmengine.registry import Registry
except ImportError as error:
    raise ImportError(
        f'mmdet_softnms needs mmdet 3.x with mmcv and mmengine to plug into a detector ({error}); install either '
        'onedl-mmdetection or mmdet, see "Installation" in the README. The operator alone, '
        'mmdet_softnms.soft_nms, works without them.'
    ) from error
try:
    import mmcv.ops
except (ImportError, AttributeError) as error:
    raise ImportError(
        f'mmcv {mmcv.__version__} is installed without its compiled ops ({error}), so no detector can run; build it '
        'after torch with "pip install --no-build-isolation", as tools/quickstart.sh does.'
    ) from error

MODELS = Registry(
    'model',
    parent=mmdet.registry.MODELS,
    scope='mmdet_softnms',
    locations=['mmdet_softnms.models.roi_heads', 'mmdet_softnms.models.rfcn', 'mmdet_softnms.models.caffe'],
)
TASK_UTILS = Registry(
    'task util',
    parent=mmdet.registry.TASK_UTILS,
    scope='mmdet_softnms',
    locations=['mmdet_softnms.rules', 'mmdet_softnms.models.caffe'],
)
METRICS = Registry(
    'metric',
    parent=mmdet.registry.METRICS,
    scope='mmdet_softnms',
    locations=['mmdet_softnms.reevaluation.candidates.forward'],
)
DATA_SAMPLERS = Registry(
    'data sampler',
    parent=mmdet.registry.DATA_SAMPLERS,
    scope='mmdet_softnms',
    locations=['mmdet_softnms.reevaluation.candidates.forward'],
)
