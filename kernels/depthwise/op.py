from kernels.reference import depthwise_conv2d
