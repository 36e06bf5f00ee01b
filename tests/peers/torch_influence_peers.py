"""Run in a process of its own, with captum importable: compares its influence functions with ours and prints JSON.

``python -m tests.peers.torch_influence_peers`` prints {case: largest difference relative to the largest score}, in
double precision.
captum's scores are + g^T (sum of Hessians + reg)^-1 g: ours by removal, with damping = reg / n.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.influence.torch_models import classification, mlp
from tests.peers import torchvision_shim  # noqa: F401
from xai_fast.influence import TorchInfluence, tracin

REGULARISATION = 12.0


def difference(ours: Tensor, theirs: Tensor) -> float:
    ours = ours.as_subclass(Tensor)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def load(model: nn.Module, path: str) -> float:
    model.load_state_dict(torch.load(path, weights_only=True))
    return 0.25 if path.endswith("0") else 0.5


def main() -> dict[str, float]:
    from captum.influence import TracInCP
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
    from captum.influence._core.influence_function import NaiveInfluenceFunction

    (X, y), (X_test, y_test) = classification(), classification(5, seed=9)
    folder = Path(tempfile.mkdtemp())
    paths = [str(folder / name) for name in ("0", "1")]
    other = mlp()
    other[0].weight.data.mul_(2)
    torch.save(other.state_dict(), paths[0])
    torch.save(mlp().state_dict(), paths[1])
    options: dict[str, Any] = {
        "checkpoints_load_func": load,
        "loss_fn": nn.CrossEntropyLoss(reduction="none"),
        "batch_size": 7,
    }
    inverse = {**options, "hessian_reg": REGULARISATION, "projection_dim": 43, "hessian_inverse_tol": 1e-12}
    dataset = TensorDataset(X, y)
    ours = TorchInfluence(mlp(), F.cross_entropy, (X, y), damping=REGULARISATION / 24).loo(X_test, y_test)
    naive = NaiveInfluenceFunction(mlp(), dataset, paths[1], **inverse)
    arnoldi = ArnoldiInfluenceFunction(mlp(), dataset, paths[1], arnoldi_dim=43, arnoldi_tol=1e-12, **inverse)
    traces = TracInCP(mlp(), dataset, paths, **options)
    along: dict[str, Any] = {"checkpoints": paths, "learning_rates": [0.25, 0.5]}
    own = tracin(mlp(), F.cross_entropy, (X, y), (X, y), **along).diagonal()
    return {
        "naive": difference(ours, naive.influence((X_test, y_test))),
        "arnoldi": difference(ours, arnoldi.influence((X_test, y_test))),
        "tracin": difference(
            tracin(mlp(), F.cross_entropy, (X, y), (X_test, y_test), **along), traces.influence((X_test, y_test))
        ),
        "tracin self": difference(own, traces.self_influence()),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
    sys.exit()
