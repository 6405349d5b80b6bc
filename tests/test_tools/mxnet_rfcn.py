"""MXNet's side of test_rfcn_mxnet_to_mmdet.py: run by an interpreter that has MXNet 1.9.1, without this project.

    python mxnet_rfcn.py FOLDER '{"two_fc": false, "deformable": true, "depth": "50", ...}' ...

Builds a test symbol of Deformable-ConvNets (backbone to class probabilities and deltas) at reduced width for each
argument, draws its weights, saves them with MXNet as ``FOLDER/0/net-0000.params``, and writes what each layer gives for
one image, and the detections by the rules of the authors' ``tester.py``, into ``FOLDER/0/outputs.npz``.
"""

import json
import os
import sys
from pathlib import Path

os.environ['MXNET_SUBGRAPH_BACKEND'] = 'NONE'  # as the symbol says; fused layers fail to bind here
import mxnet as mx
import numpy as np

BINS = 49


class Net:
    """The symbol and random weights for it, drawn layer by layer."""

    def __init__(self, depth, deformable, width, classes, anchors, reduced, seed):
        self.random = np.random.default_rng(seed)
        self.arg, self.aux, self.seen = {}, {}, {}
        self.depth, self.deformable, self.width, self.classes, self.anchors = depth, deformable, width, classes, anchors
        self.reduced = reduced
        self.data, self.im_info = mx.sym.Variable('data'), mx.sym.Variable('im_info')

    def see(self, name, symbol):
        self.seen[name] = symbol
        return symbol

    def conv(self, name, data, channels, out, kernel=1, bias=True, std=None, offset=None, **extra):
        std = std or (2 / (channels * kernel**2)) ** 0.5
        self.arg[f'{name}_weight'] = self.random.normal(0, std, (out, channels, kernel, kernel))
        if bias:
            self.arg[f'{name}_bias'] = self.random.normal(0, 0.3, out)
        extra = dict(name=name, num_filter=out, kernel=(kernel, kernel), no_bias=not bias, **extra)
        if offset is not None:
            return mx.sym.contrib.DeformableConvolution(data=data, offset=offset, num_deformable_group=4, **extra)
        return mx.sym.Convolution(data=data, **extra)

    def fc(self, name, data, inputs, out, std=None):
        self.arg[f'{name}_weight'] = self.random.normal(0, std or (2 / inputs) ** 0.5, (out, inputs))
        self.arg[f'{name}_bias'] = self.random.normal(0, 0.3, out)
        return self.see(name, mx.sym.FullyConnected(name=name, data=data, num_hidden=out))

    def bn(self, name, data, channels):
        self.arg[f'{name}_gamma'] = self.random.uniform(0.5, 1.2, channels)
        self.arg[f'{name}_beta'] = self.random.normal(0, 0.3, channels)
        self.aux[f'{name}_moving_mean'] = self.random.normal(0, 0.3, channels)
        self.aux[f'{name}_moving_var'] = self.random.uniform(0.5, 2, channels)
        return mx.sym.BatchNorm(name=name, data=data, use_global_stats=True, fix_gamma=False, eps=1e-5)

    def blocks(self, stage):
        count = {'50': (3, 4, 6, 3), '101': (3, 4, 23, 3)}[self.depth][stage]
        if self.depth == '101' and stage in (1, 2):
            return ['a', *(f'b{i}' for i in range(1, count))]
        return ['a', *(chr(ord('a') + i) for i in range(1, count))]

    def backbone(self):
        relu = mx.sym.relu
        top = self.conv('conv1', self.data, 3, self.width, 7, bias=False, std=0.02, pad=(3, 3), stride=(2, 2))
        top = relu(self.bn('bn_conv1', top, self.width))
        top = mx.sym.Pooling(top, pooling_convention='full', pad=(0, 0), kernel=(3, 3), stride=(2, 2), pool_type='max')
        self.see('pool1', top)
        channels = self.width
        for stage in range(4):
            planes = self.width * 2**stage
            for block in self.blocks(stage):
                name = f'{stage + 2}{block}'
                stride = (2, 2) if block == 'a' and stage in (1, 2) else (1, 1)  # res5 is dilated instead
                dilation = (2, 2) if stage == 3 else (1, 1)
                shortcut = top
                if block == 'a':
                    shortcut = self.conv(f'res{name}_branch1', top, channels, 4 * planes, bias=False, stride=stride)
                    shortcut = self.bn(f'bn{name}_branch1', shortcut, 4 * planes)
                inner = self.conv(f'res{name}_branch2a', top, channels, planes, bias=False, stride=stride)
                inner = relu(self.bn(f'bn{name}_branch2a', inner, planes))
                offset = None
                if self.deformable and stage == 3:
                    # Up to some pixels: never whole ones, and over the border of the map.
                    offset = self.conv(
                        f'res{name}_branch2b_offset', inner, planes, 72, 3, std=0.05, pad=dilation, dilate=dilation
                    )
                    self.see(f'res{name}_offset', offset)
                inner = self.conv(
                    f'res{name}_branch2b', inner, planes, planes, 3, bias=False, offset=offset, pad=dilation,
                    dilate=dilation,
                )  # fmt: skip
                if stage == 3:
                    self.see(f'res{name}_branch2b', inner)
                inner = relu(self.bn(f'bn{name}_branch2b', inner, planes))
                inner = self.conv(f'res{name}_branch2c', inner, planes, 4 * planes, bias=False, std=0.1 / planes**0.5)
                top = relu(shortcut + self.bn(f'bn{name}_branch2c', inner, 4 * planes))
                channels = 4 * planes
            if stage == 2:
                self.see('res4', top)
        self.see('res5', top)

    def proposals(self, scales, ratios):
        rpn = mx.sym.relu(self.conv('rpn_conv_3x3', self.seen['res4'], 16 * self.width, 16, 3, std=0.05, pad=(1, 1)))
        score = self.conv('rpn_cls_score', rpn, 16, 2 * self.anchors, std=0.04)
        deltas = self.see('rpn_bbox_pred', self.conv('rpn_bbox_pred', rpn, 16, 4 * self.anchors, std=0.01))
        pairs = mx.sym.softmax(mx.sym.Reshape(score, shape=(0, 2, -1, 0)), axis=1)
        prob = self.see('rpn_cls_prob', mx.sym.Reshape(pairs, shape=(0, 2 * self.anchors, -1, 0)))
        rois = mx.sym.contrib.Proposal(
            cls_prob=prob, bbox_pred=deltas, im_info=self.im_info, feature_stride=16, scales=scales, ratios=ratios,
            rpn_pre_nms_top_n=6000, rpn_post_nms_top_n=300, threshold=0.7, rpn_min_size=0, output_score=True,
        )  # fmt: skip
        self.see('rois', rois[0])
        self.see('roi_scores', rois[1])

    def pool(self, name, maps, out, trans=None, no_trans=False):
        extra = dict(
            data=maps, rois=self.seen['rois'], group_size=7, pooled_size=7, output_dim=out, spatial_scale=1 / 16
        )
        if not self.deformable:
            return mx.sym.contrib.PSROIPooling(**extra)
        extra.update(sample_per_part=4, part_size=7, no_trans=no_trans)
        if no_trans:
            return mx.sym.contrib.DeformablePSROIPooling(**extra)
        return mx.sym.contrib.DeformablePSROIPooling(trans=trans, trans_std=0.1, **extra)

    def rfcn(self):
        reduced = mx.sym.relu(self.conv('conv_new_1', self.seen['res5'], 32 * self.width, self.reduced, std=0.05))
        self.see('relu1', reduced)
        for branch, out, groups in (('cls', self.classes + 1, self.classes + 1), ('bbox', 8, 1)):
            std = 0.4 if branch == 'cls' else 0.02
            maps = self.see(f'rfcn_{branch}', self.conv(f'rfcn_{branch}', reduced, self.reduced, out * BINS, std=std))
            trans = None
            if self.deformable:
                trans = self.conv(f'rfcn_{branch}_offset_t', reduced, self.reduced, 2 * groups * BINS, std=0.3)
                trans = self.see(f'rfcn_{branch}_offset', self.pool('trans', trans, 2 * groups, no_trans=True))
            vote = mx.sym.Pooling(self.pool(branch, maps, out, trans), pool_type='avg', global_pool=True, kernel=(7, 7))
            vote = mx.sym.Reshape(vote, shape=(-1, out))
            self.see(f'{branch}_vote', mx.sym.softmax(vote, axis=1) if branch == 'cls' else vote)

    def two_fc(self):
        """``resnet_v1_101_rcnn.py`` and ``resnet_v1_101_rcnn_dcn.py``, behind the proposals."""
        channels, hidden = self.reduced, 48
        reduced = mx.sym.relu(self.conv('conv_new_1', self.seen['res5'], 32 * self.width, channels, std=0.05))
        self.see('relu1', reduced)
        pooling = dict(data=reduced, rois=self.seen['rois'], spatial_scale=1 / 16)
        if self.deformable:
            pool = mx.sym.contrib.DeformablePSROIPooling
            pooling.update(group_size=1, pooled_size=7, output_dim=channels, sample_per_part=4, part_size=7)
            offset = self.fc('offset', pool(no_trans=True, **pooling), BINS * channels, 2 * BINS)
            trans = mx.sym.Reshape(offset, shape=(-1, 2, 7, 7))
            pooled = pool(trans=trans, trans_std=0.1, no_trans=False, **pooling)
        else:
            pooled = mx.sym.ROIPooling(pooled_size=(7, 7), **pooling)
        self.see('roi_pool', pooled)
        top = mx.sym.relu(self.fc('fc_new_1', pooled, BINS * channels, hidden))
        top = mx.sym.relu(self.fc('fc_new_2', top, hidden, hidden))
        score = self.fc('cls_score', top, hidden, self.classes + 1, std=0.05)
        self.see('cls_vote', mx.sym.softmax(score, axis=1))
        self.see('bbox_vote', self.fc('bbox_pred', top, hidden, 4 * (self.classes + 1), std=0.004))

    def training_box_layer(self, layer, stds, repeated):
        """What training has beside the layer for testing: Deformable-ConvNets' ``do_checkpoint``."""
        for kind in ('weight', 'bias'):
            test = self.arg[f'{layer}_{kind}']
            each = np.resize(np.repeat(stds, repeated), len(test))
            self.arg[f'{layer}_{kind}_test'] = test
            self.arg[f'{layer}_{kind}'] = test / each.reshape(-1, *[1] * (test.ndim - 1))

    def run(self, image, im_info, folder):
        arrays = {name: mx.nd.array(value, dtype='float32') for name, value in self.arg.items()}
        aux = {name: mx.nd.array(value, dtype='float32') for name, value in self.aux.items()}
        saved = {f'arg:{name}': value for name, value in arrays.items()}
        saved.update({f'aux:{name}': value for name, value in aux.items()})
        mx.nd.save(str(folder / 'net-0000.params'), saved)
        # As load_param(process=True): a name with _test replaces the one without.
        for name in [name for name in arrays if '_test' in name]:
            arrays[name.replace('_test', '')] = arrays.pop(name)
        group = mx.sym.Group(list(self.seen.values()))
        arrays.update(data=mx.nd.array(image), im_info=mx.nd.array([im_info]))
        executor = group.bind(mx.cpu(), arrays, aux_states=aux, grad_req='null')
        return dict(zip(self.seen, (each.asnumpy() for each in executor.forward(is_train=False)), strict=True))


def real_rois(scores):
    """How many rows are proposals: behind them come cells that the image cuts, of score -1, and repetitions.

    Proposal's form in Python, which the authors tested with, has no cut cells.
    """
    (ends,) = np.nonzero((scores[1:] > scores[:-1]) | (scores[1:] <= 0))
    return int(ends[0]) + 1 if len(ends) else len(scores)


def boxes_of(rois, deltas, height_width):
    """``nonlinear_pred`` and ``clip_boxes`` of the authors, in float64."""
    sizes = rois[:, 2:] - rois[:, :2] + 1
    centres = rois[:, :2] + 0.5 * (sizes - 1) + deltas[:, :2] * sizes
    half = 0.5 * (np.exp(deltas[:, 2:]) * sizes - 1)
    limit = np.array(height_width[::-1]) - 1
    return np.concatenate([np.clip(centres - half, 0, limit), np.clip(centres + half, 0, limit)], axis=1)


def detections(outputs, height_width, scale, classes):
    """``im_detect`` and ``pred_eval`` of the authors' tester: float64 boxes, NMS at 0.3 with +1, 100 an image."""
    rois = outputs['rois'][:, 1:].astype(np.float64)
    found = []
    for label in range(classes):
        first = min(4 * (label + 1), outputs['bbox_vote'].shape[1] - 4)  # R-FCN has one box for all classes
        boxes = boxes_of(rois, outputs['bbox_vote'][:, first : first + 4], height_width) / scale
        scores = outputs['cls_vote'][:, label + 1]
        order = [index for index in np.argsort(-scores, kind='stable') if scores[index] > 1e-3]
        while order:
            best = order.pop(0)
            found.append([*boxes[best], scores[best], label])
            order = [other for other in order if overlap(boxes[best], boxes[other]) <= 0.3]
    found.sort(key=lambda each: -each[4])
    return np.array(found[:100])


def overlap(one, other):
    inner = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]) + 1
    if inner.min() <= 0:
        return 0.0
    area = inner.prod()
    return area / ((one[2:] - one[:2] + 1).prod() + (other[2:] - other[:2] + 1).prod() - area)


def main():
    for number, options in enumerate(map(json.loads, sys.argv[2:])):
        run(Path(sys.argv[1]) / str(number), options)


def run(folder, options):
    folder.mkdir()
    height_width, scale = options['height_width'], options['scale']
    scales, ratios = options['scales'], options['ratios']
    net = Net(
        options['depth'], options['deformable'], options['width'], options['classes'], len(scales) * len(ratios),
        options['reduced'], options['seed'],
    )  # fmt: skip
    net.backbone()
    net.proposals(scales, ratios)
    stds = [0.1, 0.1, 0.2, 0.2]
    if options['two_fc']:
        net.two_fc()
        net.training_box_layer('bbox_pred', stds, 1)
    else:
        net.rfcn()
        net.training_box_layer('rfcn_bbox', stds, BINS)
    picture = net.random.integers(0, 256, (*height_width, 3))  # RGB
    image = (picture - np.array(options['means_bgr'])[::-1]).transpose(2, 0, 1)[None]
    outputs = net.run(image.astype(np.float32), [*height_width, scale], folder)
    real = real_rois(outputs['roi_scores'].ravel())
    outputs.update({name: outputs[name][:real] for name, array in outputs.items() if len(array) == 300})
    found = detections(outputs, height_width, scale, options['classes'])
    np.savez(folder / 'outputs.npz', picture=picture.astype(np.uint8), detections=found, **outputs)


if __name__ == '__main__':
    main()
