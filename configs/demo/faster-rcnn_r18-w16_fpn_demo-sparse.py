"""The control split, in which hardly anything overlaps."""

_base_ = './faster-rcnn_r18-w16_fpn_demo.py'

test_dataloader = dict(dataset=dict(ann_file='annotations/sparse.json'))
test_evaluator = dict(ann_file='data/demo/annotations/sparse.json')
