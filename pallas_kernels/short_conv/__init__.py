"""Depthwise causal convolution over a few tokens: y_t = sum_s w[k-1-s] x_{t-s}."""

from pallas_kernels.short_conv.api import short_conv, short_conv_step

__all__ = ["short_conv", "short_conv_step"]
