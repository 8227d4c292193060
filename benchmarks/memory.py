"""memory.py: what a training step of the full-size model keeps in GPU memory, counted on any machine without its weights.

    python benchmarks/memory.py                       # Qwen2-VL-2B: 512 image tokens, answers of 128 tokens, G = 8
    python benchmarks/memory.py --layers 28 --width 3584 --inner 18944 --heads 28 --kv-heads 4 --vocabulary 152064     # 7B

The model is built on PyTorch's meta device, where tensors have shapes and no content. A prompt is read and continued by its G answers as
rrg.MLLM.score does it, and everything that autograd keeps for the backward pass is added up. What this leaves out: CUDA's own share (about
half a GB), fragmentation, and buffers that live for a moment; so allow a few GB more.
"""
import argparse
import pathlib
import sys

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import grpo  # noqa: E402
import rrg  # noqa: E402


def new_model(args):
    """A Qwen2-VL of these sizes in bf16 with adapters, without content."""
    ends = dict(bos_token_id=151643, eos_token_id=151645)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = dict(hidden_size=args.width, intermediate_size=args.inner, num_hidden_layers=args.layers, num_attention_heads=args.heads,
                num_key_value_heads=args.kv_heads, vocab_size=args.vocabulary, rope_parameters=rope, tie_word_embeddings=args.width < 2048, **ends)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=dict(hidden_size=args.width),
                                                              tie_word_embeddings=args.width < 2048, **ends)).bfloat16()
    grpo.add_lora(model, args.rank, 2 * args.rank)
    return model


def kept(model, args, games):
    """Bytes that autograd keeps of `games` prompts and their G answers, as rrg.MLLM.score runs them; weights not counted."""
    weights, held = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            held[storage._cdata] = storage  # held fast, so that no two have the same address
        return tensor

    decoder, rows, prompt = model.model.language_model, games * args.samples, args.image_tokens + 128  # the prompt's words: about 128 tokens
    new = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cache = DynamicCache()
        out = decoder(inputs_embeds=new(games, prompt, args.width), position_ids=new(3, games, prompt, dtype=torch.long), past_key_values=cache, use_cache=True)
        index = torch.arange(games, device="meta").repeat_interleave(args.samples)
        prefix = rrg.Prefix(cache, None, None, out.last_hidden_state[:, -1])
        wide = DynamicCache()
        for i, layer in enumerate(prefix.cache.layers):
            wide.update(layer.keys[index], layer.values[index], i)
        hidden = decoder(inputs_embeds=new(rows, args.max_tokens, args.width), position_ids=new(3, rows, args.max_tokens, dtype=torch.long),
                         past_key_values=wide, use_cache=True).last_hidden_state
        logps = lambda h, i: grpo.token_logps(model.lm_head(h), i)
        checkpoint(logps, hidden.flatten(0, 1), new(rows * args.max_tokens, dtype=torch.long), use_reentrant=False)
    return sum(storage.nbytes() for storage in held.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, help in (("layers", 28, "decoder layers"), ("width", 1536, "D"), ("inner", 8960, "width inside the MLP"), ("heads", 12, "attention heads"),
                                ("kv-heads", 2, "heads of keys and values"), ("vocabulary", 151936, "V"), ("rank", 64, "rank of the adapters"),
                                ("samples", 8, "G"), ("image-tokens", 512, "image tokens of a photo"), ("max-tokens", 128, "C, tokens of an answer")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="INT", help=f"{help} (default {default})")
    args = parser.parse_args()
    model = new_model(args)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - adapters
    fixed = 2 * frozen + 16 * adapters  # bf16; fp32 weight, gradient and Adam's two
    logits = 3 * 4 * min(rrg.LOGITS, args.samples * args.max_tokens * args.vocabulary)  # made anew in the backward pass, in fp32, with their gradient
    print(f"{frozen / 1e9:.2f}B frozen weights in bf16: {2 * frozen / 1e9:.1f} GB; {adapters / 1e6:.0f}M adapter weights with gradients and Adam: {16 * adapters / 1e9:.1f} GB")
    print("| --micro | kept for the backward pass, GB | with all weights and a chunk of logits, GB |\n|---|---|---|")
    for games in (1, 2, 4):
        size = kept(model, args, games)
        print(f"| {games} | {size / 1e9:.1f} | {(fixed + size + logits) / 1e9:.1f} |")
