"""Operations: fused kernels on the CPU and on CUDA, registered with torch.library, with plain PyTorch beneath.

They take tensors or any DLPack array (NumPy, CuPy, JAX) and answer in the same library.
"""

from conelens.ops._dispatch import require_kernels, use_backend
from conelens.ops._register import backends
from conelens.ops.channel_peaks import channel_peaks
from conelens.ops.collapse_parents import collapse_parents
from conelens.ops.conv2d_windows import conv2d_windows
from conelens.ops.deconv2d import deconv2d
from conelens.ops.edge_scores import edge_scores
from conelens.ops.gather_windows import gather_windows
from conelens.ops.graph_e_step import graph_e_step
from conelens.ops.max_pool2d_with_switches import max_pool2d_with_switches
from conelens.ops.max_unpool2d import max_unpool2d
from conelens.ops.relu_change import relu_change

__all__ = [
    "backends",
    "channel_peaks",
    "collapse_parents",
    "conv2d_windows",
    "deconv2d",
    "edge_scores",
    "gather_windows",
    "graph_e_step",
    "max_pool2d_with_switches",
    "max_unpool2d",
    "relu_change",
    "require_kernels",
    "use_backend",
]
