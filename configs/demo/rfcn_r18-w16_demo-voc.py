"""The crowded split in VOC format, for the R-FCN."""

_base_ = './rfcn_r18-w16_demo.py'

voc = dict(
    type='VOCDataset',
    data_root={{_base_.data_root}},
    metainfo={{_base_.metainfo}},
    ann_file='VOC2007/ImageSets/Main/crowded.txt',
    data_prefix=dict(sub_data_root='VOC2007/'),
    test_mode=True,
    pipeline={{_base_.test_pipeline}},
)
test_dataloader = dict(dataset=dict(_delete_=True, **voc))
test_evaluator = dict(_delete_=True, type='VOCMetric', metric='mAP', eval_mode='11points')
