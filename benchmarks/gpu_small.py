"""Every compiled CUDA kernel once on a small odd input, for compute-sanitizer."""

from __future__ import annotations

import torch

from conelens import ops


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for kernel, padding, size in (
                (2, 0, (32, 32)),
                (3, 1, (32, 32)),
                (3, 0, (17, 19)),
                (5, 2, (17, 19)),
            ):
                x = torch.randn(2, 16, *size, device="cuda", dtype=dtype).contiguous(memory_format=layout)
                with ops.use_backend("compiled"):
                    pooled, switches = ops.max_pool2d_with_switches(x, kernel, 2, padding, relu=True)
                    window = (kernel, 2, padding)
                    ops.max_unpool2d(pooled, switches, *window, output_size=size, relu=True)
                    ops.channel_peaks(x)
                    place = torch.tensor([[-2, 3], [30, 0], [5, 5]], device="cuda")
                    ops.gather_windows(x[:1], x[:1].expand(3, -1, -1, -1)[..., 1:4], place, place - 1, (8, 9), fill=1)
                    ops.gather_windows(x[:1], x[:1].expand(3, -1, -1, -1), place, place - 1, 8, add=True)
                    ops.relu_change(x[:1].expand(3, -1, -1, -1)[..., 1:4], x[:1], place)
                    ops.relu_change(x[:1].expand(3, -1, -1, -1), x[:1], place)
                    weight = torch.randn(16, 3, 3, 3, device="cuda", dtype=dtype)
                    ops.deconv2d(x, weight, padding=1)
    torch.cuda.synchronize()
    print("every compiled kernel ran")


if __name__ == "__main__":
    main()
