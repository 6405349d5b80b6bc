"""What a config names as a model: RoI heads that take rules, R-FCN, and what published Caffe and MXNet weights need."""
