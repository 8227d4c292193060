"""memory.py: what a training step of the full-size model keeps in GPU memory, counted on any
machine and without its weights.

    python benchmarks/memory.py       # Qwen2-VL-2B: 512 image tokens, answers of 256 tokens, G = 8
    python benchmarks/memory.py --layers 28 --width 3584 --inner 18944 \\
        --heads 28 --kv-heads 4 --vocabulary 152064                       # 7B

The model is built on PyTorch's meta device, where tensors have shapes and no content. A prompt is
read and continued by its G answers as MLLM.log_probs does it, and everything that autograd keeps
for the backward pass is added up. What this leaves out: CUDA's own share (about half a GB),
fragmentation, and buffers that live for a moment; so allow a few GB more.

Nothing on the GPU grows with the number of photos: their features lie on the CPU, where they have a
bound (model.FEATURES), and a pass fetches those of its own photos.

Shapes: B games, N = B*G answers, P prompt tokens, C tokens of an answer, V vocabulary, D width.
"""

import pathlib
import sys
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import run  # noqa: E402
from grpo import token_logps  # noqa: E402
from lora import add_lora  # noqa: E402
from model import FEATURES, LOGITS, ROWS, Prefix  # noqa: E402
from run import option  # noqa: E402

META = torch.device("meta")
PROMPT_WORDS = 128  # tokens of a prompt, about, besides those of the image


@dataclass
class Sizes:
    """How large everything is; each is an option of the command line."""

    layers: int = option(28, "decoder layers")
    width: int = option(1536, "D")
    inner: int = option(8960, "width inside the MLP")
    heads: int = option(12, "attention heads")
    kv_heads: int = option(2, "heads of keys and values")
    vocabulary: int = option(151936, "V")
    rank: int = option(64, "rank of the adapters")
    games: int = option(16, "B, games a step")
    samples: int = option(8, "G")
    image_tokens: int = option(512, "image tokens of a photo")
    max_tokens: int = option(256, "C, tokens of an answer")


def empty_model(sizes):
    """A Qwen2-VL of these sizes in bf16 with adapters, without content."""
    ends = {"bos_token_id": 151643, "eos_token_id": 151645}
    tied = sizes.width < 2048  # the small models have one matrix for embeddings and lm_head
    text_config = {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
        "tie_word_embeddings": tied,
        **ends,
    }
    config = Qwen2VLConfig(
        text_config=text_config,
        vision_config={"hidden_size": sizes.width},
        tie_word_embeddings=tied,
        **ends,
    )
    with META:
        model = Qwen2VLForConditionalGeneration(config).bfloat16()
    add_lora(model, sizes.rank, 2 * sizes.rank)
    return model


class KeptTensors:
    """Counts what autograd keeps for the backward pass; the model's weights are left out."""

    def __init__(self, model):
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        # {address of a storage: storage}, held fast so that no two have the same address. (A
        # storage on the meta device has no data, so the address of the object is its identity.)
        self.storages = {}

    def pack(self, tensor):
        """Called by autograd with each tensor that it keeps."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage
        return tensor

    def unpack(self, tensor):
        return tensor

    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def new_embeddings(rows, tokens, width):
    """-> bf16 [rows, tokens, width] without content"""
    return torch.zeros(rows, tokens, width, dtype=torch.bfloat16, device=META)


def new_positions(rows, tokens):
    """-> [3, rows, tokens] without content, one position for each axis"""
    return torch.zeros(3, rows, tokens, dtype=torch.long, device=META)


def kept_bytes(model, sizes, games):
    """Bytes that autograd keeps of B = `games` prompts and their answers, as in MLLM.log_probs."""
    decoder = model.model.language_model
    prompt_tokens = sizes.image_tokens + PROMPT_WORDS  # P
    N = games * sizes.samples

    def logps_of(hidden, ids):
        return token_logps(model.lm_head(hidden), ids)

    kept = KeptTensors(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        # Read B prompts.
        out = decoder(
            inputs_embeds=new_embeddings(games, prompt_tokens, sizes.width),
            position_ids=new_positions(games, prompt_tokens),
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        prefix = Prefix(
            cache=out.past_key_values,
            mask=torch.ones(games, prompt_tokens, device=META),
            position=torch.zeros(games, device=META),
            last=out.last_hidden_state[:, -1],
        )

        # Continue copies of them with N answers.
        rows = torch.arange(games, device=META).repeat_interleave(sizes.samples)  # [N]
        branch = prefix.take(rows)
        hidden = decoder(
            inputs_embeds=new_embeddings(N, sizes.max_tokens, sizes.width),
            position_ids=new_positions(N, sizes.max_tokens),
            past_key_values=branch.cache,
            use_cache=True,
        ).last_hidden_state  # [N, C, D]

        # Their log-probs. Logits are not kept, but made again in the backward pass.
        ids = torch.zeros(N * sizes.max_tokens, dtype=torch.long, device=META)  # [N * C]
        checkpoint(logps_of, hidden.flatten(0, 1), ids, use_reentrant=False)
    return kept.bytes()


def photo_bytes(sizes):
    """Bytes of a photo's features in bf16, as MLLM remembers them."""
    return 2 * sizes.image_tokens * sizes.width


def cache_bytes(sizes, rows, tokens):
    """Bytes of the keys and values in bf16 of `rows` texts of `tokens` tokens."""
    head_size = sizes.width // sizes.heads
    return 2 * 2 * sizes.layers * sizes.kv_heads * head_size * rows * tokens


def speaking_bytes(sizes):
    """Bytes of the caches when all N answers have reached the longest length."""
    prompt_tokens = sizes.image_tokens + PROMPT_WORDS  # P
    prompts = cache_bytes(sizes, sizes.games, prompt_tokens)
    rows = sizes.games * sizes.samples  # N
    return prompts + cache_bytes(sizes, rows, prompt_tokens + sizes.max_tokens)


def listening_bytes(sizes):
    """Bytes of the caches and features in the listener's largest pass, however many photos and
    descriptions there are."""
    prompt_tokens = sizes.image_tokens + PROMPT_WORDS  # P
    photos = ROWS * photo_bytes(sizes) + cache_bytes(sizes, ROWS, prompt_tokens)
    return photos + cache_bytes(sizes, ROWS, prompt_tokens + sizes.max_tokens)


def show_photos(sizes):
    """Print what photos take: a bound on the CPU, and on the GPU what a pass needs."""
    one = photo_bytes(sizes)
    print(
        f"photos, on the CPU: {one / 1e6:.2f} MB each, at most {FEATURES / 1e9:.1f} GB, which is "
        f"{FEATURES // one} photos; and of every one {4 * sizes.width / 1e3:.0f} KB, for mining"
    )
    print(
        f"on the GPU, without gradients: {speaking_bytes(sizes) / 1e9:.1f} GB when "
        f"{sizes.games * sizes.samples} answers are sampled, {listening_bytes(sizes) / 1e9:.1f} GB "
        f"when the listener reads {ROWS} photos; gone before the backward pass"
    )


def main():
    sizes = Sizes(**run.read_options(Sizes, __doc__))
    model = empty_model(sizes)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - adapters
    frozen_bytes = 2 * frozen  # bf16
    adapter_bytes = 16 * adapters  # fp32: the weight, its gradient and Adam's two averages
    print(
        f"{frozen / 1e9:.2f}B frozen weights in bf16: {frozen_bytes / 1e9:.1f} GB; "
        f"{adapters / 1e6:.0f}M adapter weights with gradients and Adam: "
        f"{adapter_bytes / 1e9:.1f} GB"
    )

    show_photos(sizes)

    # A chunk of logits is made again in the backward pass, in fp32 and with its gradient: three
    # tensors of its size.
    logits = min(LOGITS, sizes.samples * sizes.max_tokens * sizes.vocabulary)
    logit_bytes = 3 * 4 * logits

    print(
        "| --micro | kept for the backward pass, GB | with all weights and a chunk of logits, GB |"
    )
    print("|---|---|---|")
    for games in (1, 2, 4):
        kept = kept_bytes(model, sizes, games)
        total = frozen_bytes + adapter_bytes + kept + logit_bytes
        print(f"| {games} | {kept / 1e9:.1f} | {total / 1e9:.1f} |")


if __name__ == "__main__":
    run.main(main)
