"""`python -m llava_hivtp.training`: LLaVA's own arguments, and a pruner."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from llava_hivtp.loading import local_tower
from llava_hivtp.pruners import build_pruner, read_arguments

# What a LLaVA checkpoint fixes: the trainer would put its own defaults in their place.
FIXED = (
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit status. Mistakes are found before the first step."""
    own, rest = _parser().parse_known_args(arguments)
    try:
        pruners = [build_pruner(own.pruner, **read_arguments(each)) for each in own.pruner_args]
        rest += _from_checkpoint(own)
        from transformers import set_seed

        from llava_hivtp.training.trainer import train

        sys.argv[1:] = ["--model_name_or_path", own.model_name_or_path, "--seed", str(own.seed)]
        sys.argv += rest
        set_seed(own.seed)  # the trainer does so behind LoRA's first weights
        train(own.pruner, pruners, own.attn_implementation)
    except (FileNotFoundError, ImportError, ValueError, TypeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_hivtp.training",
        description="LLaVA's trainer on pruned inputs. All further arguments are LLaVA's own.",
        allow_abbrev=False,
    )
    parser.add_argument("--model_name_or_path", required=True, help="the checkpoint to tune")
    parser.add_argument("--pruner", default="hivtp", help="method (default: %(default)s)")
    parser.add_argument(
        "--pruner_args", nargs="+", default=[""], metavar="K=V,...",
        help="such as r=2,k=25,c=2; of several, each step draws one",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=42, help="of all that is drawn")
    parser.add_argument("--attn_implementation", help="of the language model (default: sdpa)")
    fixed = parser.add_argument_group("LLaVA's own, by default as the checkpoint has them")
    for name in (*FIXED, "vision_tower", "image_aspect_ratio"):
        fixed.add_argument(f"--{name}", metavar="X")
    return parser


def _from_checkpoint(own: argparse.Namespace) -> list[str]:
    """LLaVA's arguments that the checkpoint answers, where the command line does not.

    Raises:
        ValueError: if both do, and differ; or if the trainer cannot train this checkpoint.
    """
    from transformers import PretrainedConfig

    path = own.model_name_or_path
    settings, _ = PretrainedConfig.get_config_dict(path)
    if settings.get("model_type") not in ("llava_llama", "llama"):
        raise ValueError(
            f"{path} is a {settings.get('model_type')!r}; LLaVA's trainer trains LLaVA on Llama or "
            "Vicuna only ('llava_llama', 'llama')"
        )
    known: dict[str, Any] = {name: settings[name] for name in FIXED if name in settings}
    if "mm_vision_tower" in settings:
        known["vision_tower"] = local_tower(path, settings["mm_vision_tower"])
    for name, value in known.items():
        asked = getattr(own, name)
        if asked is not None and asked.lower() != str(value).lower():
            raise ValueError(f"--{name} {asked}: {path} has {value}; leave the argument out")
    known.setdefault("vision_tower", own.vision_tower)
    if known["vision_tower"] is None:
        raise ValueError(f"{path} has no vision tower: name one, --vision_tower FOLDER_OR_HUB_ID")
    aspect = own.image_aspect_ratio or settings.get("image_aspect_ratio", "square")
    if aspect not in ("square", "pad"):
        raise ValueError(
            f"image_aspect_ratio={aspect!r}: LLaVA's released trainer makes one tile of an image, "
            "'square' or 'pad', so LLaVA-NeXT cannot be tuned with it"
        )
    known["image_aspect_ratio"] = aspect
    given = {name: getattr(own, name) for name in FIXED if getattr(own, name) is not None}
    pairs = (given | known).items()
    return [word for name, value in pairs for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    sys.exit(main())
