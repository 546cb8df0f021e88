"""What each process of a run on several ranks does in `test_ranks_flow.py`: every recipe for a few steps.

python tests/two_ranks.py DATA OUT RECIPE [RECIPE ...]
"""

import sys
from pathlib import Path

import torch

from spade3d.commands import begin, pretrain_encoder
from spade3d.configuration import resolve
from spade3d.recipes.recipe import find_recipe
from spade3d.training import ranks

SMALL = {
    "steps": 3,
    "seed": 5,
    "device": "cpu",
    "loaders": 0,
    "crop": {"shape": (16, 16, 16), "anchors": 4, "places": 8, "frame": "box"},
    "network": {"feature_size": 12, "window": 4, "heads": (3, 3, 6, 6)},
}
OF_RECIPE = {
    "spade": {"contrast": {"global_memory": 16, "local_memory": 64, "global_weight": 1.0, "local_weight": 1.0}},
    "moco": {"contrast": {"memory": 32}},
    "dagman": {
        "distill": {"stage": 1, "mask_token": True},
        "prior": {"source": "bands"},
        "network": SMALL["network"] | {"drop_path": 0.5},
    },
    "dagman-visible": {
        "distill": {"stage": 1, "drop_hidden": True},
        "optim": {"accumulate": 2},
    },
    "spade-dagman": {
        "distill": {"stage": 1},
        "contrast": {"global_memory": 16, "local_memory": 64, "global_weight": 1.0, "local_weight": 1.0},
    },
}


def main(data: str, out: str, *recipes: str) -> None:
    torch.set_num_threads(1)
    with ranks.joined("cpu"):
        for name in recipes:
            recipe, folder = find_recipe(name.removesuffix("-visible")), Path(out) / name
            flags = SMALL | OF_RECIPE.get(name, {}) | {"data": {"path": data}}
            settings = resolve(recipe.settings, [], flags, environment={})
            recipe.check(settings)
            settings = ranks.once(lambda r=recipe, s=settings, f=folder: begin(r, s, f, "cpu", strict=False))
            pretrain_encoder(recipe, settings, folder, resume=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
