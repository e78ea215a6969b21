"""Load a checkpoint of any family, ready to prune."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPVisionModel, PretrainedConfig

from llava_hivtp.families import FAMILIES, attach, family_of
from llava_hivtp.families.base import check_layout, check_positions, check_pruner
from llava_hivtp.model import (
    PrunedLlava,
    PrunedLlavaLlamaForCausalLM,
    PrunedLlavaMistralForCausalLM,
)
from llava_hivtp.pruners import Pruner, build_pruner
from llava_hivtp.versions import before_5
from llava_hivtp.zero3 import join, spread

logger = logging.getLogger(__name__)

# transformers 4 raises itself, and would leave a weight it passes over on no device.
REPORTS_SHAPES = not before_5()
DAMAGED = (SafetensorError, EOFError, OSError, pickle.UnpicklingError, RuntimeError, ValueError)
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate decides
ATTENTION = ("sdpa", "eager", "flash_attention_2")
TRAINED_WITH = "trained_with"  # in a config.json: the method a checkpoint was tuned under
_CLASSES = {
    "LlavaLlamaForCausalLM": PrunedLlavaLlamaForCausalLM,
    "LlavaMistralForCausalLM": PrunedLlavaMistralForCausalLM,
}


def load(
    path: str | Path,
    pruner: Pruner | str = "none",
    *,
    layout: str = "unpad",
    positions: str = "packed",
    dtype: torch.dtype | str | None = None,
    device_map: str | dict | None = None,
    attn_implementation: str = "sdpa",
    quantization: str | None = None,
    zero3: bool = False,
) -> tuple[Any, Any, Any, int]:
    """Load a LLaVA-v1.5 or LLaVA-NeXT checkpoint, official or transformers', with a pruner.

    If it was tuned under another method than this one, that is said in the log.

    Several threads may use one model: `generate` lets them in one after another, and
    `model.kept` is each thread's own. Hold `model.lock` to swap `model.pruner` and ask.

    Args:
        path: a folder or a hub id such as liuhaotian/llava-v1.5-7b or llava-hf/llava-1.5-7b-hf.
            A relative `mm_vision_tower` in an official config.json is looked for inside the
            folder first.
        pruner: the method, or its name in PRUNERS; `model.pruner` swaps it later.
        layout: how AnyRes tiles are put together, see `attach`.
        positions: of what stays, "packed" or "kept", see `attach`.
        dtype: of the weights; default float16 on a GPU, float32 on a CPU.
        device_map: a device, "auto" or accelerate's map; default the GPU if there is one.
        attn_implementation: "sdpa", "eager" or "flash_attention_2", for the language model.
        quantization: "8bit" or "4bit" (bitsandbytes), or None.
        zero3: spread the weights over the processes that torchrun started (DeepSpeed). All of
            them must generate equally often, see `llava_hivtp.zero3`.

    Returns:
        (model, tokenizer, image_processor, context_len), as LLaVA's own loader. For a checkpoint
        of transformers the third is its whole processor: it takes text and images and has the
        chat template. Images are always processed by PIL, so that pixel values are equal on every
        machine and under both transformers versions.

    Raises:
        FileNotFoundError: if the checkpoint or its vision tower is missing or incomplete.
        ImportError: if an optional package is asked for and absent.
        ValueError: if checkpoint, pruner or layout are not supported.
    """
    settings = _config_dict(path)
    cls = _class_of(settings, path)
    _check_complete(Path(path))
    pruner = build_pruner(pruner) if isinstance(pruner, str) else pruner
    check_pruner(pruner)
    _propose(path, settings, pruner)
    check_layout(layout, family_of(cls).layouts)
    check_positions(positions)
    official = issubclass(cls, PrunedLlava)
    if zero3:
        _check_zero3(official, device_map, quantization)
        join()
    options = _options(dtype, device_map, attn_implementation, quantization, zero3)
    read = _load_official if official else _load_transformers
    model, tokenizer, processor, length = read(cls, path, pruner, options)
    attach(model.eval(), pruner, layout, positions)
    model.decode = tokenizer.decode
    if zero3:
        spread(model)
    return model, tokenizer, processor, length


def _options(
    dtype: torch.dtype | str | None,
    device_map: str | dict | None,
    attention: str,
    quantization: str | None,
    zero3: bool,
) -> dict[str, Any]:
    """What `from_pretrained` is told of dtype, place, attention and quantization."""
    device_map = device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(dtype, device_map)
    if zero3:
        device_map = "cpu"  # and from there on, share by share
    if isinstance(device_map, (str, torch.device)) and device_map not in PLACEMENTS:
        device_map = {"": _device(device_map)}
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": True, "device_map": device_map}
    options["attn_implementation"] = _attention(attention)
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, dtype)
    return options


def _load_official(
    cls: type, path: str | Path, pruner: Pruner, options: dict[str, Any]
) -> tuple[Any, Any, Any, int]:
    """Model, tokenizer, image processor, context length; the tower may lie elsewhere."""
    config = cls.config_class.from_pretrained(
        path, attn_implementation=options["attn_implementation"]
    )
    config.mm_vision_tower = local_tower(path, config.mm_vision_tower)
    processor = _image_processor(config.mm_vision_tower)
    tokenizer = _tokenizer(path, cls)
    model = _whole(cls, path, config=config, **options)
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        clip = _whole(CLIPVisionModel, config.mm_vision_tower, torch_dtype=options["torch_dtype"])
        tower.vision_tower = clip.requires_grad_(False).to(model.device)
        tower.is_loaded = True
    tower.image_processor = processor
    _add_image_tokens(model, tokenizer)
    return model, tokenizer, processor, getattr(config, "max_sequence_length", 2048)


def _load_transformers(
    cls: type, path: str | Path, pruner: Pruner, options: dict[str, Any]
) -> tuple[Any, Any, Any, int]:
    """Model, tokenizer, processor, context length of one of transformers' own classes."""
    config = cls.config_class.from_pretrained(path)
    _outlined(cls, config, pruner)  # what does not fit is refused before weights are read
    processor = _processor(cls, path)
    model = _whole(cls, path, **options)
    model.chat = processor
    length = getattr(config.get_text_config(), "max_position_embeddings", 2048)
    return model, processor.tokenizer, processor, length


def outline(
    path: str | Path, dtype: torch.dtype | str | None = None, layout: str = "unpad"
) -> tuple[Any, Any]:
    """A checkpoint of transformers without its weights: model and processor.

    Prompts, pixels and counts of tokens can be had from them, answers can not.

    Raises:
        FileNotFoundError: if the checkpoint is missing.
        ValueError: if it is official LLaVA's, or the layout is not supported.
    """
    settings = _config_dict(path)
    cls = _transformers_class(settings)
    if cls is None:
        raise ValueError(
            f"{path} is no checkpoint of transformers' format, such as llava-hf/llava-1.5-7b-hf: "
            "llava_hivtp.convert.to_transformers writes official ones anew"
        )
    check_layout(layout, family_of(cls).layouts)
    model = _outlined(cls, cls.config_class.from_pretrained(path), Pruner(), layout)
    model.to(choose_dtype(dtype, "cuda" if torch.cuda.is_available() else "cpu"))
    model.chat = _processor(cls, path)
    return model, model.chat


def _outlined(cls: type, config: Any, pruner: Pruner, layout: str = "unpad") -> Any:
    with torch.device("meta"):
        return attach(cls(config), pruner, layout)


def _processor(cls: type, path: str | Path) -> Any:
    """The processor of one of transformers' own classes."""
    try:
        processor = family_of(cls).processor(path)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"the processor in {path} cannot be read ({error}): fetch the checkpoint again"
        ) from error
    processor.tokenizer.padding_side = "left"  # generation continues at the end of a row
    return processor


def _propose(path: str | Path, settings: dict[str, Any], pruner: Pruner) -> None:
    """Say with which method a checkpoint was tuned, unless it is the one in use."""
    if (tuned := settings.get(TRAINED_WITH)) is None:
        return
    try:
        proposed = [build_pruner(tuned["pruner"], **each) for each in tuned["arguments"]]
    except (KeyError, TypeError, ValueError) as error:  # a method of the user's may not be here
        logger.warning("%s was tuned under a method that cannot be built here: %s", path, error)
        return
    if pruner not in proposed:
        names = " or ".join(map(str, proposed))
        logger.warning("%s was tuned under %s; it runs under %s", path, names, pruner)


def _check_zero3(official: bool, device_map: Any, quantization: str | None) -> None:
    if not official:
        raise ValueError("zero3 spreads official LLaVA checkpoints only")
    if device_map is not None or quantization is not None:
        raise ValueError(
            "zero3 places the weights itself and does not quantize them: leave out "
            f"device_map={device_map!r} and quantization={quantization!r}"
        )


def _whole(cls: type, path: str | Path, **options: Any) -> Any:
    """`from_pretrained`, where a missing, misshapen or damaged weight is an error."""
    try:
        model, report = cls.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=REPORTS_SHAPES, **options
        )
    except DAMAGED as error:
        if " shape " in str(error) and not REPORTS_SHAPES:
            raise ValueError(
                f"{path}: a weight has another shape than its config.json asks for ({error}): "
                "fetch the checkpoint again"
            ) from error
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # out of memory, say
        if type(error) is ValueError:
            raise
        if "weights_only" in _whole_story(error):  # PyTorch advises to run what lies in the file
            raise ValueError(
                f"the weights in {path} hold more than tensors; nothing of it was run. "
                "Do not open the file otherwise: fetch the checkpoint from its authors"
            ) from None
        raise FileNotFoundError(
            f"the weights in {path} cannot be read ({error}): fetch the checkpoint again"
        ) from error
    for name, found, needed in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{path}: the weight {name} has shape {tuple(found)}, its config.json asks for "
            f"{tuple(needed)}: fetch the checkpoint again"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{path} lacks {len(missing)} weights, such as {missing[0]}: fetch the checkpoint again"
        )
    return model


def _whole_story(error: BaseException | None) -> str:
    """What an error says, and those it came from: transformers 4 hides them behind its own."""
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(said)


def _config_dict(path: str | Path) -> dict[str, Any]:
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path must be a folder or a hub id, got {path!r}")
    here = os.path.isdir(path)  # False where a name is too long, which pathlib raises on
    if here and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json: it is no LLaVA checkpoint")
    if here:
        _read_json(Path(path) / "config.json")
    try:
        settings, _ = PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no checkpoint at {path}: neither a folder nor a downloaded hub id; "
            f"fetch it first, for instance with `python -m eval prefetch` ({error})"
        ) from error
    if _transformers_class(settings) is not None:
        return settings
    tower = settings.get("mm_vision_tower")
    if not tower:
        known = ", ".join(name for name in FAMILIES if hasattr(transformers, name))
        raise ValueError(
            f"{path} names no mm_vision_tower, as official LLaVA does, and its model_type "
            f"{settings.get('model_type')!r} is none of transformers' {known}"
        )
    if not isinstance(tower, str):
        raise ValueError(f"{path}: mm_vision_tower must be a folder or a hub id, got {tower!r}")
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object: fetch the checkpoint again")
    return found


def _class_of(settings: dict[str, Any], path: str | Path) -> type:
    if (stock := _transformers_class(settings)) is not None:
        return stock
    names = _architectures(settings)
    for name, cls in _CLASSES.items():
        if name in names or f"Pruned{name}" in names:
            return cls
    known = [*_CLASSES, *(name for name in FAMILIES if hasattr(transformers, name))]
    raise ValueError(f"{path} has architectures {names}; supported are {sorted(known)}")


def _architectures(settings: dict[str, Any]) -> list[str]:
    names = settings.get("architectures") or []
    return names if isinstance(names, list) else [names]


def _transformers_class(settings: dict[str, Any]) -> type | None:
    """Transformers' own class of a family that prunes, if the checkpoint is one's."""
    if "mm_vision_tower" in settings:  # official LLaVA
        return None
    for name in FAMILIES:
        stock = getattr(transformers, name, None)
        if stock is not None and settings.get("model_type") == stock.config_class.model_type:
            return stock
    return None


def _check_complete(folder: Path) -> None:
    """Raise a FileNotFoundError if a local folder lacks weight files."""
    if not folder.is_dir():
        return
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            places = _read_json(folder / name).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
                raise ValueError(f"{folder / name} has no weight_map: fetch the checkpoint again")
            shards = set(places.values())
            missing = sorted(shard for shard in shards if not (folder / shard).is_file())
            if missing:
                raise FileNotFoundError(f"{folder} lacks {missing}: fetch the checkpoint again")
            return
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{folder} holds no weights: fetch the checkpoint again")


def choose_dtype(dtype: torch.dtype | str | None, device_map: Any) -> torch.dtype:
    """The dtype asked for; by default float16 on a GPU, float32 on a CPU."""
    if dtype is None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        on_gpu = any(str(place) not in ("cpu", "disk") for place in places)
        return torch.float16 if on_gpu and torch.cuda.is_available() else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    return found


def _device(name: str | torch.device) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device_map must be a device, one of {PLACEMENTS} or a map, got {name!r}"
        ) from error


def _tokenizer(path: str | Path, cls: type) -> Any:
    """As LLaVA's own builder chooses: the slow tokenizer, but for Mistral."""
    try:
        return AutoTokenizer.from_pretrained(path, use_fast=cls is PrunedLlavaMistralForCausalLM)
    except ImportError:
        raise
    except Exception as error:  # the tokenizers package raises bare ones
        raise ValueError(
            f"the tokenizer in {path} cannot be read ({error}): fetch the checkpoint again"
        ) from error


def _attention(name: str) -> str:
    if name not in ATTENTION:
        raise ValueError(f"attn_implementation must be one of {ATTENTION}, got {name!r}")
    if name == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ImportError(
            "attn_implementation='flash_attention_2' needs flash-attn: "
            "pip install 'llava_hivtp[flash]', or use 'sdpa'"
        )
    return name


def _quantization(name: str, dtype: torch.dtype) -> Any:
    if name not in ("8bit", "4bit"):
        raise ValueError(f"quantization must be '8bit', '4bit' or None, got {name!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"quantization={name!r} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )


def local_tower(path: str | Path, tower: str) -> str:
    """The vision tower inside the checkpoint's folder, if it is there."""
    inside = Path(path) / tower
    return str(inside) if inside.is_dir() else tower


def pil_processor() -> type:
    """CLIP's image processor on PIL: with torchvision, transformers 5 takes one of other pixels."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:  # transformers 4 has the PIL one only
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor
    return CLIPImageProcessorPil


def _image_processor(tower: str) -> Any:
    try:
        kind = PretrainedConfig.get_config_dict(tower)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"the vision tower {tower} is not here; fetch it first") from error
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"the vision tower {tower} is a {kind}; only CLIP towers can be pruned")
    try:
        return pil_processor().from_pretrained(tower)
    except OSError as error:
        raise FileNotFoundError(f"{tower} has no image processor; fetch it again") from error


def _add_image_tokens(model: Any, tokenizer: Any) -> None:
    """Add LLaVA's image marker tokens where the checkpoint was trained with them."""
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    if len(tokenizer) != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
