"""The R-FCN beside this with deformable pooling, nothing else.

Offsets begin at 0, as in the paper. Its deformable convolutions in res5 have no place here, see
``deformable-rfcn_mobilenetv2_fpn_voc07-holdout.py``.
"""

_base_ = './rfcn_mobilenetv2_fpn96_voc07-holdout.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            pooling='deformable',
            init_cfg=dict(
                override=[dict(type='Constant', name=name, val=0) for name in ('cls_offset_maps', 'reg_offset_maps')]
            ),
        )
    )
)
