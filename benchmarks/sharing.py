"""sharing.py: what "prefill once, continue many" saves in recognition, P photos put to C descriptions, measured side by side in one run.

    python benchmarks/sharing.py                      # the toy model: 10 photos x 20 descriptions, three rounds
    python benchmarks/sharing.py --model DIR --photos 4 --concepts 8

Three ways to the same answers (which is checked): ours, where a photo is encoded and read once and all descriptions continue it; in batches
without sharing, where each of the P x C pairs is a prompt of its own and its picture is encoded for it; and one pair at a time. Toy pictures are
drawn before the clock starts: drawing is no work of any of them.
"""
import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import torch  # noqa: E402

import data  # noqa: E402
import reward  # noqa: E402
import rrg  # noqa: E402
import toy  # noqa: E402


def ours(mllm, pairs, most):
    mllm.features.clear()
    return mllm.reply(reward.RECOGNITION, pairs, most)


@torch.no_grad()
def batched(mllm, pairs, most):
    texts = []
    for start in range(0, len(pairs), rrg.ROWS):
        mllm.features.clear()
        some = [(data.Photo(f"{start + i}", photo.open), text) for i, (photo, text) in enumerate(pairs[start:start + rrg.ROWS])]  # none is known
        prompts = [mllm.chat(photo, reward.RECOGNITION[0] + text + reward.RECOGNITION[1]) for photo, text in some]
        texts += mllm.sample(mllm.prefill(prompts, [[photo] for photo, _ in some]), most).texts
    return texts


def one_by_one(mllm, pairs, most):
    return [text for pair in pairs for text in ours(mllm, [pair], most)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(toy.FOLDER), help="checkpoint (default: the toy model)")
    parser.add_argument("--photos", type=int, default=10, help="P, photos (default 10)")
    parser.add_argument("--concepts", type=int, default=20, help="C, concepts, each with a description (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="each way is timed so often, in turn; the median counts (default 3)")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest answer, in tokens (default 32)")
    args = parser.parse_args()
    mllm = rrg.MLLM(args.model, 401408)
    concepts = rrg.load_world(mllm, "", 0)[0][::3][:args.concepts]
    photos = [photo for concept in concepts for photo in concept.photos[1:]][::2][:args.photos]
    photos = [dataclasses.replace(photo, open=functools.cache(photo.open)) for photo in photos]
    for photo in photos:
        photo.open()
    texts = [reward.quoted(". ".join(toy.sentence(concept.photos[0].truth, toy.IDENTITY))) for concept in concepts]
    pairs = [(photo, text) for photo in photos for text in texts]
    times, answers = {way: [] for way in (ours, batched, one_by_one)}, {}
    for _ in range(args.rounds):
        for way in times:
            started = time.time()
            answers[way] = way(mllm, pairs, args.max_tokens)
            times[way].append(time.time() - started)
    agree = {way: sum(a == b for a, b in zip(answers[ours], answers[way])) / len(pairs) for way in times}
    median = {way: statistics.median(seconds) for way, seconds in times.items()}
    print(f"{len(photos)} photos x {len(texts)} descriptions = {len(pairs)} pairs, {args.model} on {rrg.machine(mllm.device)}, median of {args.rounds}")
    print("| way | pictures encoded | seconds | against ours | same answers |\n|---|---|---|---|---|")
    for way, encoded in ((ours, len(photos)), (batched, len(pairs)), (one_by_one, len(pairs))):
        print(f"| {way.__name__.replace('_', ' ')} | {encoded} | {median[way]:.1f} | {median[way] / median[ours]:.1f} x | {agree[way]:.1%} |")
