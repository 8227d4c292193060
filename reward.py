"""reward.py: what a description is worth.

The speaker answers in three fields; the first is a note to itself, the other two are the description:

    <thinking> I see a mug. </thinking> <coarse> A photo of a red mug </coarse>
    <detailed> The red striped mug with a star badge. </detailed>

The listener is shown one candidate picture at a time and asked whether the description fits it. What it answers becomes

    rho_u = P(yes) / (P(yes) + P(no))            the listener's belief in candidate u of the K in the pool; rho_+ is that in the hard positive
    soft-gated   r = rho_+ / sum_u rho_u         if rho_+ is the largest, else 0     (the default)
    binary       r = 1                           if rho_+ is the largest, else 0
    soft         r = rho_+ / sum_u rho_u         always

The gate: a wrong pick never pays. The share: once the pick is right, each further detail that rules out a look-alike still pays. To this come
a reward for the format and a small one for the length, each with its weight and its own column in metrics.csv.

RePIC, the system RRG is compared with, rewards only what a rule can verify, one task per prompt: is the thing of picture 1 in picture 2
(object consistency tuning, OCT), where is it (visual localization, VLT), and does a caption call what it shows by the names that were given
(identity consistency, ICT).

The prompts of the game and of evaluate.py's tasks stand here together: the toy model's tokenizer has one token for each fixed piece of them,
so after a change of wording it has to be rebuilt (python toy.py).

Where it departs from the paper and its authors' research code:
1. An answer is parsed strictly: three fields, in order, nothing around them. One that cannot be parsed earns nothing from the listener
   and is never shown to it. (The research code has four fallbacks, so malformed answers are paid.)
2. "soft" pays the share of the *right* candidate. (The research code pays the predicted candidate's, so a confident wrong pick earns most.)
3. A tie is not a win: the right candidate must beat every other one. If scoring fails, an error is raised; it never becomes a reward of 0.
4. Every single-token spelling of yes and no counts, not only the lower-case ones.
5. The prompts say "the main subject" where the paper's name the category, which is not known for a photo from somebody's phone.
6. RePIC's rewards are the paper's, not its code's, which found "no" in "know", read whole numbers only, compared boxes in pixels of two
   different sizes, and let a caption of several names pass with closing tags.

Shapes: N descriptions, K candidates in a pool, V vocabulary.
"""
import re
from typing import NamedTuple

import torch

SPEAK = ('Describe the main subject of this photo so that somebody could tell it apart from very similar ones. Answer in exactly this form: '
         '<thinking> what makes it special </thinking> <coarse> 5 to 6 words that start with "A photo of a" </coarse> '
         '<detailed> one fluent sentence that starts with "The" and names 3 to 4 visible attributes that set it apart </detailed> '
         'Do not mention the background, the location or the state of the subject. If it is a person, leave out clothing and accessories.')
# Each of these is what comes before and what comes after; the comment says what is put between the two.
LISTEN = ("Read this description:\n", "\nDoes every part of it fit the main subject of this photo? Answer yes or no.")  # a quoted description
RECOGNITION = (  # a quoted description
    "Somebody described a thing of theirs:\n",
    "\nIs the main subject of this photo that very thing? Compare what identifies it, such as colour, shape, pattern and texture, and ignore "
    "pose, background and light. Answer only with JSON in this form:\n"
    '{"Reasoning": "a brief comparison", "Answer": "Yes or No"}')
CAPTIONING = (  # one line a candidate: its letter, its quoted description, "is", its name in angle brackets
    "Somebody described some things of theirs:\n",
    "\nOne of them is the main subject of this photo. Compare what identifies it, such as colour, shape, pattern and texture, and ignore pose, "
    "background and light. Then write a caption of this photo that calls the subject by its name. Answer only with JSON in this form:\n"
    '{"Reasoning": "a brief comparison", "Answer": "the letter", "Caption": "the caption with the <name>"}')
VQA = (  # the name and the quoted description; the question; two options
    "Somebody described the main subject of this photo:\n",
    '\nLook at the photo and choose the right option. Answer only with JSON in this form:\n{"Answer": "A or B"}')

# RePIC's tasks, each in several wordings, of which a prompt gets one. Pictures come first, then the text.
NAMED = "All pictures but the last show one thing each, in this order: "
REPIC = {
    "oct": [  # a name in angle brackets
        ("The first picture shows ",
         ". Is that very thing in the second picture, too? Your final answer must be either yes or no, with no additional output."),
        ("You see ", " in the first picture. Can you find the same one in the second picture? Answer with yes or no only.")],
    "vlt": [  # a phrase such as "red mug"
        ("Where in this picture is the ", '? Return its bounding box as JSON: {"bbox_2d": [x1, y1, x2, y2]}'),
        ("Locate the ", ' in this picture. For bounding box coordinates, answer in JSON format: {"bbox_2d": [x1, y1, x2, y2]}')],
    "ict": [(NAMED, ".\nGive a caption of the last picture."),  # names in angle brackets, with commas between them
            (NAMED, ".\nGive a personalized caption of the last picture, calling what you know by its name."),
            (NAMED, ".\nDescribe the last picture in detail, without repeating what was said here.")]}

FIELDS = {"thinking": 0.34, "coarse": 0.33, "detailed": 0.33}  # and what each is worth when it is well formed


class Description(NamedTuple):
    """The part of an answer that others get to read. `text` is what the listener judges and what a database would store."""
    coarse: str
    detailed: str

    @property
    def text(self):
        return f"{self.coarse.rstrip('.')}. {self.detailed}"  # one full stop, whether or not coarse came with its own


def field(answer, name):
    """The content of <name>...</name> in an answer; None if it is missing, there twice, empty or has a tag inside."""
    found = re.findall(rf"<{name}>([^<>]*)</{name}>", answer)
    once = answer.count(f"<{name}>") == answer.count(f"</{name}>") == len(found) == 1
    return (" ".join(found[0].split()) or None) if once else None


def parse(answer):
    """An answer's Description, or None unless it is exactly the three well-formed fields in order."""
    form = r"\s*".join(rf"<{name}>[^<>]*</{name}>" for name in FIELDS)  # in this order, with nothing around them or between
    parts = [field(answer, name) for name in FIELDS]
    return Description(*parts[1:]) if all(parts) and re.fullmatch(rf"\s*{form}\s*", answer) else None


def quoted(text, markers=()):
    """A description as the listener may read it: between quotation marks that it cannot close, and without anything that the chat template
    would take for markup. Otherwise a speaker could learn to end the question and say yes itself.

    `markers` are the texts that the tokenizer treats as special. They, angle brackets, quotation marks and line breaks give way to
    spaces or apostrophes; a space, not nothing, so that the pieces around a marker cannot form a new one.
    """
    for marker in sorted(markers, key=len, reverse=True):  # the longest first: one may contain another
        text = text.replace(marker, " ")
    text = re.sub(r"<\|.*?\|>|[<>|]", " ", text)
    return '"' + " ".join(re.sub('["“”„«»`]', "'", text).split()) + '"'


def belief(logits, yes, no):
    """rho, the listener's belief, from logits [N, V] of the first token of its answer -> [N], in fp32. `yes` and `no` are the token ids of
    every spelling. The listener is never sampled: what it would say first is all that is asked."""
    logits = logits.float()
    # P(yes) / (P(yes) + P(no)) = sigmoid(log P(yes) - log P(no)), in which softmax's denominator cancels
    return torch.sigmoid(logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1))


def listener_reward(rho, positive, kind="soft_gated"):
    """rho [N, K], positive [N] (the hard positive's place in the pool) -> (reward [N], right [N] bool: it beats every other candidate)."""
    if not rho.isfinite().all() or (rho < 0).any() or (rho > 1).any():
        raise FloatingPointError("the listener's answer is not a probability; scoring has failed")
    own = rho.gather(1, positive[:, None]).squeeze(1)  # [N], rho_+
    best_other = rho.scatter(1, positive[:, None], -1.0).amax(1)  # [N], rho_+ itself being hidden behind a -1
    right = own > best_other  # [N]; not >=: a tie is not a win
    share = own / rho.sum(1).clamp(min=1e-30)  # [N]; a listener may believe in none of them
    rewards = {"binary": right.float(), "soft": share, "soft_gated": share * right}
    if kind not in rewards:
        raise ValueError(f'unknown reward "{kind}": soft_gated, binary or soft')
    return rewards[kind], right


def format_reward(answer):
    """0.34 + 0.33 + 0.33 for a well-formed thinking, coarse and detailed field."""
    return sum(worth for name, worth in FIELDS.items() if field(answer, name))


def length_reward(description):
    """1/3 for a coarse phrase of 5 or 6 words, 2/3 for a detailed part that is one sentence of 4 to 40 words."""
    # A sentence ends at .!? before a space or the end: not within 1.5. (It does after "No." in "No. 5".)
    sentences = re.findall(r"[.!?](?=\s|$)", description.detailed.rstrip(".!? ") + ".")
    coarse = 5 <= len(description.coarse.split()) <= 6
    detailed = len(sentences) == 1 and 4 <= len(description.detailed.split()) <= 40
    return coarse / 3 + 2 * detailed / 3


# ------------------------------------------------------------------------------------------------ RePIC: what a rule can verify
def oct_reward(answer, solution):
    """Object consistency: 1 if of the words yes and no the answer contains only `solution`. (RePIC, section 3.1)"""
    return float(set(re.findall(r"\b(yes|no)\b", answer.lower())) == {solution})


def read_box(answer):
    """The box (x1, y1, x2, y2) that an answer gives as [x1, y1, x2, y2], in JSON or not; None for none, or for several different ones."""
    number = r"\s*(-?\d+(?:\.\d+)?)\s*"
    found = {tuple(map(float, box)) for box in re.findall(rf"\[{number},{number},{number},{number}\]", answer)}
    return found.pop() if len(found) == 1 else None


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2), as areas of the plane; 0 where one of them is empty or inside out."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    areas = sum(max(0, box[2] - box[0]) * max(0, box[3] - box[1]) for box in (a, b))
    return common / (areas - common) if common else 0.0


def vlt_reward(answer, box, size, seen):
    """Visual localization: 1 if the answer's box overlaps `box` with an IoU of at least 0.5. `box` is in pixels of a picture of `size`
    (width, height), the answer in pixels of the picture as the model has `seen` it, resized. (RePIC, section 3.1)"""
    read = read_box(answer)
    scale = [size[i] / seen[i] for i in (0, 1)] * 2  # of x1, y1, x2, y2: from what the model saw to the picture
    return float(read is not None and iou([v * s for v, s in zip(read, scale)], box) >= 0.5)


def ict_reward(answer, names, min_chars):
    """Identity consistency: the share of `names` (as "<name>") that a caption uses, letter by letter; 0 for a caption of fewer than `min_chars`
    characters, or one that uses a name as a pair of tags, <name>...</name>. (RePIC, section 3.2 and, for the length, appendix)"""
    if len(answer) < min_chars or any(name.replace("<", "</") in answer for name in names):
        return 0.0
    return sum(name in answer for name in names) / len(names)
