"""Which file prunes which class of models: a family is added here."""

from __future__ import annotations

# A stock class, or a base of it -> the mixin that prunes it; imported when such a model comes.
FAMILIES = {
    "LlavaMetaForCausalLM": "llava_hivtp.model:PrunedLlava",  # official LLaVA
    "LlavaForConditionalGeneration": "llava_hivtp.families.hf_llava:PrunedLlavaHF",
    "LlavaNextForConditionalGeneration": "llava_hivtp.families.hf_llava_next:PrunedLlavaNextHF",
    "LlavaOnevisionForConditionalGeneration": "llava_hivtp.families.hf_onevision:PrunedOnevisionHF",
    "Qwen2_5_VLForConditionalGeneration": "llava_hivtp.families.hf_qwen2_5_vl:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "llava_hivtp.families.hf_qwen3_vl:PrunedQwen3VL",
}
