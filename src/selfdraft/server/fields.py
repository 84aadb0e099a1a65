"""Fields that the models of the requests do not have: without effect, refused by name, or unknown."""

from __future__ import annotations

from .errors import refused
from .requests import Body

WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "cache_prompt",
        "parallel_tool_calls",
    }
)
"""They do not change the text: accepted."""
REFUSED: dict[str, object] = {
    "suffix": None,
    "audio": None,
    "web_search_options": None,
    "functions": None,
    "function_call": None,
    "typical_p": 1,
    "typ_p": 1,
    "mirostat": None,
    "mirostat_tau": None,
    "mirostat_eta": None,
    "dry_multiplier": None,
    "xtc_probability": None,
    "xtc_threshold": None,
    "top_a": None,
    "tfs_z": 1,
    "top_n_sigma": None,
    "dynatemp_range": None,
    "eta_cutoff": None,
    "epsilon_cutoff": None,
    "use_beam_search": None,
    "num_beams": 1,
    "length_penalty": 1,
    "early_stopping": None,
    "no_repeat_ngram_size": None,
    "bad_words": None,
    "allowed_token_ids": None,
    "truncate_prompt_tokens": -1,
    "guided_choice": None,
    "guided_json": None,
    "structured_outputs": None,
    "structural_tag": None,
    "grammar": None,
    "json_schema": None,
    "stop_token_ids": None,
    "include_stop_str_in_output": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "add_special_tokens": None,
    "add_generation_prompt": True,
    "chat_template": None,
    "documents": None,
    "prompt_embeds": None,
    "logits_processors": None,
    "prompt_logprobs": None,
    "verbosity": "medium",
    "thinking_budget_tokens": None,
    "thinking": None,
    "thinking_token_budget": None,
    "lora": None,
    "repeat_penalty": 1,
    "n_predict": -1,
    "samplers": None,
    "images": None,
    "image_data": None,
}
"""Fields of other servers that would change the answer and are not honoured -> the value that changes
nothing; what is empty or false does not either."""
REMEMBERED = 1_000
"""Names of unknown fields that are warned of once each; they come from clients."""


def check_fields(body: Body, seen: set[str], strict: bool) -> list[str]:
    """Names of unknown fields that were not seen before, to warn of.

    Raises ApiError for a field that would change the text and is not honoured, and under `strict` for any
    unknown one.
    """
    given = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    for name in sorted(given.keys() & REFUSED.keys()):
        if given[name] not in (REFUSED[name], "", [], {}, 0):
            raise refused(f"{name} is not supported, and leaving it out would change the answer", name)
    unknown = sorted(given.keys() - WITHOUT_EFFECT - REFUSED.keys())
    if strict and unknown:
        raise refused(f"unknown field {unknown[0]!r:.80}; this server runs with --strict", unknown[0][:80])
    fresh = [name for name in unknown if name not in seen][: REMEMBERED - len(seen)]
    seen.update(fresh)
    return fresh
