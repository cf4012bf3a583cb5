"""CUDA graphs over fixed numbers of rows.

Late rounds of the octree are short: launching forty kernels takes longer than running them. A captured graph
is launched once.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ossnet.field.engine.products import ROWS, Products


class Replay:
    """`Products` on a CUDA device, captured for a few numbers of rows; a call takes the next larger one.

    Args:
        products: With its memory allocated; not to be allocated again.
    """

    def __init__(self, products: Products) -> None:
        self.products = products
        # One after the other they use the same memory: what is answered is copied before the next is launched.
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        rows = products.rows
        while rows >= max(ROWS, products.rows // 256):
            self._graphs[rows] = self._capture(rows)
            rows //= 4

    def __call__(
        self, locations: Float[Tensor, "N 3"], coordinates: Float[Tensor, "N W"]
    ) -> Float[Tensor, "N K"]:
        """As `Products`."""
        n = len(locations)
        rows = min(r for r in self._graphs if r >= n)
        graph, places, described, logits = self._graphs[rows]
        places[:n], described[:n] = locations, coordinates
        graph.replay()
        return logits[:n].clone()

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        device = self.products.device
        places = torch.zeros(rows, 3, device=device)
        described = torch.zeros(rows, self.products.coordinates, device=device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compiles what is compiled on first use, outside of the capture
            for _ in range(2):
                self.products(places, described)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # By itself torch captures on a stream of the current device, whatever the products' is.
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            logits = self.products(places, described)
        return graph, places, described, logits
