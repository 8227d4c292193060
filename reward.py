"""reward.py: what a description earns: the listener's belief in the right photo, and something for
its form and length. (How much of each is a matter of the weights in rrg.py.)

In a game the speaker sees one photo, the target, and describes it. The listener reads the
description and has K photos before it: the hard positive, which is *another* photo of the same
thing, and K - 1 photos of look-alikes, the hard negatives (data.py).

The speaker answers in three fields. The first is a note to itself, the other two are the
description:

    <thinking> I see a mug. </thinking>
    <coarse> A photo of a red mug </coarse>
    <detailed> The red striped mug with a star badge. </detailed>

The listener is shown the K photos of a pool one at a time and is asked whether the description
fits. Its belief in photo u is

    rho_u = P(yes) / (P(yes) + P(no))

With rho_+, its belief in the hard positive, the description earns

    soft_gated    rho_+ / sum_u rho_u    if rho_+ is the largest belief, else 0      (default)
    binary        1                      if rho_+ is the largest belief, else 0
    soft          rho_+ / sum_u rho_u    always

The gate: a wrong pick never pays. The share: once the pick is right, each further detail that
rules out a look-alike still pays.

Where it departs from the RRG paper and its authors' research code:
1. An answer is parsed strictly: three fields, in order, nothing around them. A malformed one
   earns nothing from the listener and is never shown to it. (The research code has a few
   fallbacks, so malformed answers are paid.)
2. "soft" pays the share of the *right* photo. (The research code pays the share of the photo
   that was picked, so a confident wrong pick earns most.)
3. A tie is not a win: the hard positive must beat every other photo. If scoring fails, an error
   is raised; it never becomes a reward of 0.
4. Every single-token spelling of yes and no counts, not only the lower-case ones; and a share
   stays what it is where no belief reaches 0.3. (The research code halves it there.)
5. The listener is asked whether *every part* of a description fits, and reads both of its fields.
6. Wordings are our own; what they ask for is in the paper's figures 6 to 8. The speaker is asked
   about "the main subject" where the category is not known, as of a photo from somebody's phone.
   Where it is, the prompt gives it, as the paper's prompts do.
7. The length reward is on, with a small weight, and pays 5 to 6 words and one sentence of 4 to 40
   words, as the prompt asks. (The research code's is off by default; it takes 0.2 off for more than
   one sentence or fewer than 20 words, and 0.1 for a coarse phrase that has not 6 to 8 words.)

Shapes: N descriptions, K photos in a pool, V vocabulary.
"""

import re
from dataclasses import dataclass

import torch

# ------------------------------------------------ what the speaker is asked, and what it answered
MAIN_SUBJECT = "the main subject of this photo"
SPEAK = (  # {subject}: see `speaker_prompt`
    "Describe {subject} so that somebody could tell it apart from very similar ones. Do not "
    "mention the background, the location or the state it is in. If it is a person, leave out "
    "clothing and accessories. The coarse line has 5 to 6 words. The detailed line is one fluent "
    "sentence that names 3 to 4 visible attributes which set it apart. Answer in exactly these "
    "three lines, and fill in the dots:\n"
    "<thinking>What makes it special is ...</thinking>\n"
    "<coarse>A photo of a ...</coarse>\n"
    "<detailed>The ...</detailed>"
)
FIELD_REWARDS = {"thinking": 0.34, "coarse": 0.33, "detailed": 0.33}  # the fields, in their order


def speaker_prompt(photo, category):
    """What the speaker is asked about a photo.   category: of its thing, "object" if not known

    In the toy world the category stays away, since its model knows one wording only.
    """
    words = re.sub(r"[\W_]+", " ", category).strip()
    subject = f"the {words} in this photo"
    if category == "object" or not words or photo.truth:
        subject = MAIN_SUBJECT
    return SPEAK.replace("{subject}", subject)


@dataclass(frozen=True)
class Description:
    """The part of an answer that others get to read."""

    coarse: str
    detailed: str

    @property
    def text(self):
        """What the listener judges and a database stores."""
        # One full stop between the two, whether or not the coarse part came with its own.
        return f"{self.coarse.rstrip('.')}. {self.detailed}"


def parse(answer):
    """Read an answer strictly.   -> Description, or None for a malformed answer (departure 1)

    Nobody hears of a malformed answer, but `format_reward` still pays for its good fields.
    """
    fields = [rf"<{name}>([^<>]*)</{name}>" for name in FIELD_REWARDS]
    found = re.fullmatch(r"\s*" + r"\s*".join(fields) + r"\s*", answer)
    if not found:
        return None
    thinking, coarse, detailed = [" ".join(content.split()) for content in found.groups()]
    if not (thinking and coarse and detailed):
        return None
    return Description(coarse, detailed)


# ------------------------------------------------- what the listener is asked, and what it believes
LISTEN = (  # {text} is a quoted description
    "Read this description:\n{text}\n"
    "Does every part of it fit the main subject of this photo? Answer yes or no."
)


def quoted(text, markers=()):
    """A description as it is put to a reader: between quotation marks that it cannot close.

    Otherwise a speaker could learn to end the question and say yes itself. `markers` are the
    texts that the tokenizer treats as special. A quotation mark becomes an apostrophe; a marker,
    an angle bracket, a bar or a line break becomes a space. (Not nothing, or the pieces around a
    marker could form a new one.)
    """
    for marker in sorted(markers, key=len, reverse=True):  # one marker may contain another
        text = text.replace(marker, " ")
    text = re.sub(r"<\|[^|]*\|>|[<>|]", " ", text)  # [^|], so that it takes linear time
    text = re.sub('["“”„«»`]', "'", text)
    return '"' + " ".join(text.split()) + '"'


def belief(logits, yes, no):
    """rho, the listener's belief that a description fits, in fp32.   logits [N, V] -> [N]

    logits are those of the first token of its answer; yes, no: the token ids of every spelling.
    The listener is never sampled: what it would say first is all that is asked.
    """
    logits = logits.float()
    # log P(yes) and log P(no), but for softmax's denominator, which cancels in the difference.
    log_yes = logits[:, yes].logsumexp(-1)  # [N]
    log_no = logits[:, no].logsumexp(-1)  # [N]
    return torch.sigmoid(log_yes - log_no)


# --------------------------------------------------------------------------------------- rewards
def listener_reward(beliefs, positive, kind="soft_gated"):
    """What the listener's choice pays (the table above).

    beliefs [N, K] in [0, 1]; positive [N], the hard positive's place in the pool
    -> (rewards [N], picked_right [N] bool)

    A malformed answer is a row of zeros: a tie, so it is not right and earns 0.
    Raises FloatingPointError on a belief that is not a probability.
    """
    if not beliefs.isfinite().all() or (beliefs < 0).any() or (beliefs > 1).any():
        raise FloatingPointError("the listener's belief is not a probability; scoring has failed")

    own = beliefs.gather(1, positive[:, None]).squeeze(1)  # [N], rho_+
    # A -1 hides the hard positive, so that what is left is the best of the others.
    best_other = beliefs.scatter(1, positive[:, None], -1.0).amax(1)  # [N]
    picked_right = own > best_other  # [N]; a tie is not a win
    share = own / beliefs.sum(1).clamp(min=1e-30)  # [N]; a listener may believe in no photo

    if kind == "soft_gated":
        return share * picked_right, picked_right
    if kind == "binary":
        return picked_right.float(), picked_right
    if kind == "soft":
        return share, picked_right
    raise ValueError(f'unknown reward "{kind}": soft_gated, binary or soft')


def format_reward(answer):
    """0.34 + 0.33 + 0.33 for a well-formed thinking, coarse and detailed field.

    A field is well formed if it is there once, is not empty and has no tag inside. So part of the
    way to an answer that can be parsed pays, too.
    """
    reward = 0.0
    for name, worth in FIELD_REWARDS.items():
        contents = re.findall(rf"<{name}>([^<>]*)</{name}>", answer)
        once = answer.count(f"<{name}>") == answer.count(f"</{name}>") == len(contents) == 1
        if once and contents[0].strip():
            reward += worth
    return reward


def length_reward(description):
    """1/3 for a coarse phrase of 5 or 6 words, 2/3 for one detailed sentence of 4 to 40 words.

    0 for None, a malformed answer.
    """
    if description is None:
        return 0.0
    coarse_words = len(description.coarse.split())
    detailed_words = len(description.detailed.split())
    # A sentence ends at .!? before a space or the end: not within 1.5. ("No. 5" is counted wrong.)
    # Whatever ends the text, nothing or "." or "...", is replaced by one ".".
    ends = re.findall(r"[.!?](?=\s|$)", description.detailed.rstrip(".!? ") + ".")

    coarse_fits = 5 <= coarse_words <= 6
    detailed_fits = len(ends) == 1 and 4 <= detailed_words <= 40
    return coarse_fits / 3 + 2 * detailed_fits / 3
