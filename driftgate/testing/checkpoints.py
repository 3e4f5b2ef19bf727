"""Tiny random Qwen3 checkpoints: what the demo and the tests run real engines and real trainers on.

No weights can be downloaded where the tests run, so this module makes them: a dense and a
mixture-of-experts model of a few hundred thousand parameters with a real tokenizer and a real chat
template, in the Hugging Face layout that vLLM, transformers and the teacher load as any other.

What is special about them, and why:

- ``initializer_range`` 0.2 and norm weights ``1 + 0.3 * randn``: flat distributions or norms of 1.0
  would hide wrong numbers.
- The model speaks *words*: hidden channel 0 is a constant that no layer writes to, and the head's
  column 0 turns it into a bias against every token that is not a whole word with its leading space.
  Word tokens tokenize back to themselves, so a history that keeps the text keeps the ids, as it
  almost always does for a trained model, and almost never would for a random one.
- ``<|im_end|>`` has a bias of its own, so that half of all answers end within 64 tokens.

Weights depend on the seed and the recipe only. The tokenizer depends on the interpreter's standard
library, which it is trained on; it is the same for every checkpoint made on one machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "CheckpointKind", "make_checkpoint", "make_tokenizer"]

CheckpointKind = Literal["dense", "moe"]
CheckpointDtype = Literal["bfloat16", "float32"]

RECIPE_VERSION = 3
"""Raise it when anything below changes what is written: cached checkpoints are then made again."""

RECIPE_FILE = "driftgate-recipe.json"
VOCAB_SIZE = 2000
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Added tokens that stay in the text, as in Qwen3's own tokenizer, so that parsers see them."""

CORPUS_BYTES = 3 << 20
"""Of standard library source: enough for 2,000 merges, and under two seconds to train on."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenizer."""

BIAS_CHANNEL = 0
NON_WORD_WEIGHT = -240.0
"""Head weight on the constant channel, which is 0.04 to 0.1 after the last norm: -10 to -24."""
BLANK_WEIGHT = -900.0
"""As above, for tokens that are only blanks: -36 to -90. A grammar allows them between any two
tokens of JSON and little else, so that a random model would fill its whole answer with them."""
END_WEIGHT: dict[CheckpointKind, float] = {"dense": 90.0, "moe": 53.0}
"""Lifts ``<|im_end|>`` to two per cent a token, tried: half of all answers end within 64 tokens."""

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions. Their signatures:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each call return a JSON object within tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or content %}
                {{- '\\n' }}
            {%- endif %}
            {%- set function = call.function if call.function else call %}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {%- if function.arguments is string %}
                {{- function.arguments }}
            {%- else %}
                {{- function.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""ChatML with hermes-style tools. Nothing is trimmed, so a history that keeps an answer's text
continues the tokens that were sampled."""


def make_checkpoint(
    path: Path | str,
    kind: CheckpointKind,
    *,
    seed: int = 0,
    dtype: CheckpointDtype = "bfloat16",
) -> Path:
    """Write a tiny checkpoint into the directory ``path``, or return at once if it holds this one.

    Raises ``FileExistsError`` when ``path`` holds something else: nothing foreign is overwritten.
    """
    target = Path(path)
    recipe = {"version": RECIPE_VERSION, "kind": kind, "seed": seed, "dtype": dtype}
    digest = hashlib.sha256(msgspec.json.encode(recipe, order="sorted")).hexdigest()[:16]
    wanted = msgspec.json.encode({**recipe, "digest": digest}, order="sorted")
    marker = target / RECIPE_FILE
    if marker.is_file():
        if marker.read_bytes() == wanted:
            return target
        shutil.rmtree(target)
    elif target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty and has no {RECIPE_FILE}; give another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "checkpoint"
        made.mkdir()
        _write(made, kind, seed=seed, dtype=dtype)
        (made / RECIPE_FILE).write_bytes(wanted)
        if target.exists():
            target.rmdir()
        made.rename(target)
    return target


def _write(path: Path, kind: CheckpointKind, *, seed: int, dtype: CheckpointDtype) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = _config(kind, eos_token_id=end, pad_token_id=pad)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, kind, seed=seed, words=_words(tokenizer), blanks=_blanks(tokenizer), end=end)
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    # Weights are cast one by one: model.to(dtype) would also cast the rotary buffer (TRAINERS.md).
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = dtype
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)
    finally:
        if progress:
            logging.enable_progress_bar()


def _config(kind: CheckpointKind, *, eos_token_id: int, pad_token_id: int) -> Any:
    from transformers import Qwen3Config, Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if kind == "dense":
        return Qwen3Config(**common)
    return Qwen3MoeConfig(
        **common,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _fill(
    model: torch.nn.Module,
    kind: CheckpointKind,
    *,
    seed: int,
    words: list[int],
    blanks: list[int],
    end: int,
) -> None:
    """Draw every weight from one generator, in the order of names: the library's own initialiser
    may change between versions."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1.0 + 0.3 * noise if "norm" in name else 0.2 * noise
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            parameter.data[..., BIAS_CHANNEL, :] = 0.0
        elif name == "model.embed_tokens.weight":
            parameter.data[:, BIAS_CHANNEL] = 1.0
        elif name == "model.norm.weight":
            parameter.data[BIAS_CHANNEL] = 1.0
        elif name == "lm_head.weight":
            parameter.data[:, BIAS_CHANNEL] = NON_WORD_WEIGHT
            parameter.data[words, BIAS_CHANNEL] = 0.0
            parameter.data[blanks, BIAS_CHANNEL] = BLANK_WEIGHT
            parameter.data[end] *= 0.25  # moved less by what was said: few answers are empty
            parameter.data[end, BIAS_CHANNEL] = END_WEIGHT[kind]


def _words(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the tokens that are a space and a whole word, and that tokenize back to themselves."""
    texts = {index: tokenizer.decode([index]) for index in range(len(tokenizer))}
    whole = [index for index, text in texts.items() if re.fullmatch(r" [A-Za-z]+", text)]
    again = tokenizer([texts[index] for index in whole], add_special_tokens=False)["input_ids"]
    return [index for index, ids in zip(whole, again, strict=True) if ids == [index]]


def _blanks(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the tokens that are blanks and nothing else."""
    return [index for index in range(len(tokenizer)) if tokenizer.decode([index]).isspace()]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every checkpoint, with `CHAT_TEMPLATE`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(TEXT_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in TEXT_TOKENS])
    assert bpe.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def _corpus() -> list[str]:
    """Standard library sources in the order of their names, ``CORPUS_BYTES`` of them."""
    texts: list[str] = []
    size = 0
    for source in sorted(Path(os.__file__).parent.glob("*.py")):
        text = source.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        size += len(text)
        if size >= CORPUS_BYTES:
            break
    return texts
