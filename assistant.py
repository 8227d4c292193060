"""assistant.py: an assistant that knows your things only by their descriptions.

    describe   the speaker, which is the model with an adapter on or as it came, describes each
               thing's reference photos
    remember   the descriptions become a database in RAP's JSON: all that the assistant will know
               of these things
    retrieve   for a new photo, the k things whose reference photos and descriptions are most
               like it
    believe    does the description of any of them fit the photo? If not, it shows none of your
               things

Then there are three tasks, all for the model *without* adapter. It sees the new photo and reads
the database, nothing else:

    caption    the photo and the k lettered descriptions: which letter is it? And a caption that
               calls the thing by its name
    recognise  the photo and one description: is it that very thing?
    answer     the photo, the right description and a question with two options: which is right?

The command line puts one photo to the assistant, up to its caption; evaluate.py measures all of it.

    python assistant.py --photos my_photos/ photo.jpg                    # describe, then ask
    python assistant.py --photos my_photos/ --out things.json photo.jpg  # and keep the descriptions
    python assistant.py --database things.json photo.jpg                 # ask again, without photos

--photos is a folder with a photo or a folder of photos of each of your things, which bears its
name. The toy model knows toys only: for real things add --model Qwen/Qwen2-VL-2B-Instruct and, of
a run of rrg.py, --adapter runs/x/adapter.

Where it departs from the paper and its authors' research code:
1. The model's own features are the default in retrieval: photos are compared by the frozen tower,
   a photo and a text by the listener's belief. --embedder takes a CLIP, which is theirs.
2. Candidates are lettered in random order. (By rank, "A" would be a good guess.)
3. Answers are parsed strictly. One that cannot be read is never guessed at, and a caption that
   calls the thing by another name than its letter's is such an answer.
4. Recognition and questions show the new photo only, as the paper's prompt says. (The research
   code shows a reference photo as well; so does evaluate.py --show-reference.)
5. The reader gets the coarse and the detailed part of a description. (The research code gives it
   the coarse one.)
6. Several photos of a thing may be described; the descriptions are joined. (Theirs is of one.)
7. An answer may take 256 tokens. (The research code lets a description take 128.)
8. The command line can answer "none of your things", and then writes no caption. (The paper's
   photos all show a known thing; so evaluate.py has every photo captioned.)

Shapes: P photos, C concepts in the database, k retrieved candidates, D width of the vectors that
are compared.
"""

import dataclasses
import json
import pathlib
import random
import re
from dataclasses import dataclass
from functools import partial

import torch

import run
import toy
from data import (
    DETAIL,
    UNREADABLE,
    VIDEO_SUFFIXES,
    Concept,
    DataError,
    Photo,
    find_folder,
    load_concepts,
    one_line_errors,
    read_photo,
    tag,
)
from lora import find_adapter, load_adapter, read_adapter_config, remove_lora, write_json
from model import MLLM, PICTURE, Clip, Prompt
from reward import parse, speaker_prompt
from run import option

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
YES_OR_NO = ("Yes", "No")
K = 3  # candidates
# Measured on things of four toy worlds that an adapter had not met, of which it described a photo:
# 98 % of their other photos are found, and 97 % are refused where their own thing is left out and
# its look-alikes stay. (.05: 98 and 96 %; .5: 97 and 98 %.) For real photos it is not measured.
THRESHOLD = 0.2
ANY_TEXT = None  # of `read_answer`
# What somebody else's JSON raises when it is taken apart and is not in the form it should have.
UNEXPECTED = (KeyError, TypeError, AttributeError, IndexError, ValueError)


# ---------------------------------------------------------------------------------- what is asked
# What the assistant is asked about a photo. {text} is what it knows of the user's concepts.
RECOGNITION = (  # {text}: a quoted description
    "Somebody described a thing of theirs:\n{text}\n"
    "Is the main subject of this photo that very thing? Compare what identifies it, such as "
    "colour, shape, pattern and texture, and ignore pose, background and light. "
    "Answer only with JSON in this form:\n"
    '{"Reasoning": "a brief comparison", "Answer": "Yes or No"}'
)
CAPTIONING = (  # {text}: a line a candidate: its letter, its quoted description, "is", its <name>
    "Somebody described some things of theirs:\n{text}\n"
    "One of them is the main subject of this photo. Compare what identifies it, such as colour, "
    "shape, pattern and texture, and ignore pose, background and light. "
    "Then write a caption of this photo that calls the subject by its name. "
    "Answer only with JSON in this form:\n"
    '{"Reasoning": "a brief comparison", "Answer": "the letter", '
    '"Caption": "the caption with the <name>"}'
)
VQA = (  # {text}: the <name> and the quoted description; the question; two lettered options
    "Somebody described the main subject of this photo:\n{text}\n"
    "Look at the photo and choose the right option. Answer only with JSON in this form:\n"
    '{"Answer": "A or B"}'
)


# Stands before one of the last two templates where a reference photo is shown, too.
TWO_PHOTOS = (
    f"Photo 1, which the question is about: {PICTURE}\n"
    f"Photo 2, of the thing that is described here: {PICTURE}\n"
)


# ----------------------------------------------------------------------------- reading the answers
class JsonObject(dict):
    """A JSON object that remembers whether a field was there twice, which a dict would hide."""

    def __init__(self, pairs):
        super().__init__(pairs)
        self.has_repeats = len(self) < len(pairs)


def read_answer(text, **fields):
    """Read an answer strictly (departure 3).   -> {field: text}, or None if it cannot be read

    The answer must be a JSON object and nothing else; a ``` fence around it is allowed.
    fields: those that must be there, each with the values it may have, in any case, or ANY_TEXT.
    Other fields are kept where they are texts.
    """
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(\{.*\})\s*```\s*", text, re.DOTALL)
    if fenced:
        text = fenced[1]
    try:
        content = json.loads(text, object_pairs_hook=JsonObject)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, JsonObject) or content.has_repeats:
        return None

    row = {}
    for name, value in content.items():
        if isinstance(value, str):
            row[name] = value.strip()
    for name, allowed in fields.items():
        if name not in row:
            return None
        if allowed is not ANY_TEXT:
            spellings = {value.lower(): value for value in allowed}
            row[name] = spellings.get(row[name].lower())
        if not row[name]:
            return None
    return row


# -------------------------------------------------------------------------------------- describe
@dataclass(frozen=True)
class Entry(Concept):
    """What is remembered of a concept: a description, and the photos it was written from."""

    text: str
    malformed: bool = False  # is the description in another form than was asked for?


def without_tags(answer):
    """The description in a speaker's answer; of a malformed one all words, without the tags."""
    description = parse(answer)
    if description:
        return description.text
    return " ".join(re.sub(r"</?\w+>", " ", answer).split())


def describe(mllm, concepts, max_tokens):
    """Describe all photos of some concepts, greedily, by the model as it is now.   -> [Entry]

    A malformed description is remembered, too: an assistant has to live with what the speaker
    says.
    """
    prompts = {}  # {Photo: Prompt}
    for concept in concepts:
        for photo in concept.photos:
            prompts[photo] = Prompt([photo], speaker_prompt(photo, concept.category))
    answers = mllm.greedy(list(prompts.values()), max_tokens, progress="describing")
    answer_of = dict(zip(prompts, answers, strict=True))

    entries = []
    for concept in concepts:
        answers = [answer_of[photo] for photo in concept.photos]
        text = " ".join(without_tags(answer) for answer in answers)
        malformed = any(parse(answer) is None for answer in answers)
        entries.append(Entry(concept.name, concept.category, concept.photos, text, malformed))
    return entries


# -------------------------------------------------------------------------------------- remember
def published_form(what):
    """`with published_form("..."):` whatever goes wrong with somebody else's JSON is one error."""
    message = f"{what} is not in the form it is published in; missing or unexpected"
    return one_line_errors(message, *UNEXPECTED)


def folders_around(source, root=None):
    """Where the pictures that a JSON file names may be: its own folder and the two above, the one
    we are in, and the data's, `root`."""
    folders = [*source.resolve().parents[:3], pathlib.Path.cwd()]
    if root:
        folders += [pathlib.Path(root).resolve(), pathlib.Path(root).resolve().parent]
    return folders


def find_photo(path, source, root=None):
    """The photo that the JSON file `source` names by a path, perhaps of another machine.   -> Photo

    That is the longest end of the path that exists in one of `folders_around`, at least its folder
    and its name: another picture that happens to be called 1.png will not do. A mere name is a
    picture next to the file. Raises DataError where there is none.
    """
    parts = pathlib.PurePosixPath(str(path).replace("\\", "/")).parts
    parts = [part for part in parts if part != "/"]
    folders = folders_around(source, root)
    if len(parts) == 1:
        folders = folders[:1]
    for first in range(max(1, len(parts) - 1)):
        for folder in folders:
            file = folder.joinpath(*parts[first:])
            if ".." not in parts and file.is_file():
                return Photo(str(file), partial(read_photo, file))
    raise DataError(
        f"{source} names the picture {path}, which is not there (neither next to it nor in the two "
        "folders above)"
    )


def flatten_text(info):
    """The text of a database's `info`: a text, a list, or a dictionary of parts.

    Its category is not part of the text.
    """
    if isinstance(info, dict):
        info = [part for key, part in info.items() if key != "category"]
    if not isinstance(info, list):
        return str(info or "").strip()
    parts = [flatten_text(part) for part in info]
    return " ".join(part for part in parts if part)


def read_entry(marker, item, content, source, photos, root):
    """One concept of a database.   -> Entry

    marker: its name in angle brackets; item: what the "concept_dict" holds of it; content: the
    whole database; source: its file; photos {name: Photo} are known already; root: see
    `find_photo`
    """
    images = item.get("image")
    if not images:
        owners = content.get("path_to_concept", {})
        images = [image for image, owner in owners.items() if owner == marker]
    if not isinstance(images, list):
        images = [images]

    info = item.get("info")
    category = item.get("category")
    if not category and isinstance(info, dict):
        category = info.get("category")
    return Entry(
        name=marker.strip("<>"),
        category=category or "object",
        photos=[photos.get(image) or find_photo(image, source, root) for image in images],
        text=flatten_text(info),
    )


def read_database(path, photos=(), root=None):
    """A database of descriptions in RAP's JSON, by its file or its folder.   -> [Entry]

    A picture is the one of `photos` with its name, else a file (see `find_photo`), perhaps in
    `root`, the folder of the data. A concept without `info` has an empty description. Raises
    DataError for anything else than such a database, and for pictures that are not there.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        folder = path
        path = folder / "database_mod.json"  # RePIC's name for the one that counts
        if not path.is_file():
            path = folder / "database.json"
    content = run.load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("concept_dict"), dict):
        raise DataError(f'{path} is not a database of descriptions: it has no "concept_dict"')

    by_name = {photo.name: photo for photo in photos}
    entries = []
    with published_form("the database of descriptions"):
        for marker, item in content["concept_dict"].items():
            entries.append(read_entry(marker, item, content, path, by_name, root))
    return entries


def database(entries, root=""):
    """RAP's JSON of a database. root: the folder in which the photos' names begin.

    -> {"concept_dict": {<name>: ...}, "path_to_concept": {picture: <name>}}
    """
    concepts = {}
    owners = {}
    for entry in entries:
        marker = f"<{entry.name}>"
        paths = [str(pathlib.Path(root) / photo.name) for photo in entry.photos]
        concepts[marker] = {
            "name": entry.name,
            "image": paths[0] if len(paths) == 1 else paths,
            "info": entry.text,
            "category": entry.category,
        }
        owners.update(dict.fromkeys(paths, marker))
    return {"concept_dict": concepts, "path_to_concept": owners}


# -------------------------------------------------------------------------------------- retrieve
@dataclass
class Retrieved:
    """A description that was retrieved for a photo, and how alike the two are."""

    entry: Entry
    score: float  # 0 to 1: half picture, half words
    picture: float  # similarity to the entry's photos, as measured
    words: float  # similarity to its description, as measured


def rescale(similarities):
    """Each photo's similarities, stretched to reach from 0 to 1.   [P, C] -> [P, C]"""
    lowest = similarities.amin(1, keepdim=True)  # [P, 1]
    highest = similarities.amax(1, keepdim=True)  # [P, 1]
    return (similarities - lowest) / (highest - lowest).clamp(min=1e-12)


def retrieval_scores(picture, words):
    """Half picture, half words.   similarities [P, C], [P, C] -> scores [P, C]

    The two live on different scales, so each is rescaled over the concepts.
    """
    return (rescale(picture) + rescale(words)) / 2


def picture_similarity(embedder, photos, entries):
    """How much photos look like the entries' photos.   -> [P, C]

    Several photos of an entry count by the mean of their vectors. Raises DataError for an entry
    without any.
    """
    of_entries = []
    for entry in entries:
        if not entry.photos:
            raise DataError(
                f"the database has no picture of {entry.name}, so photos cannot be compared with it"
            )
        of_entries += entry.photos
    vectors = embedder.embed([*photos, *of_entries])  # {photo name: [D]}

    memory = []
    for entry in entries:
        memory.append(torch.stack([vectors[photo.name] for photo in entry.photos]).mean(0))
    new = torch.stack([vectors[photo.name] for photo in photos])  # [P, D]
    return new @ torch.stack(memory).T


def retrieve(embedder, photos, entries, k):
    """The k entries that are most like each photo, best first.   -> [[Retrieved] * k] * P

    embedder: an MLLM, or a Clip. Of two that are equally alike the first in the database wins.
    """
    picture = picture_similarity(embedder, photos, entries)  # [P, C]
    words = embedder.compare(photos, [entry.text for entry in entries])  # [P, C]
    scores = retrieval_scores(picture, words)  # [P, C]
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # [P, k]

    retrieved = []
    for row, places in enumerate(best.tolist()):
        of_photo = []
        for place in places:
            found = Retrieved(
                entry=entries[place],
                score=scores[row, place].item(),
                picture=picture[row, place].item(),
                words=words[row, place].item(),
            )
            of_photo.append(found)
        retrieved.append(of_photo)
    return retrieved


# --------------------------------------------------------------------------------------- believe
def believe(mllm, photos, candidates):
    """The listener's belief that the description of each candidate fits the photo.

    candidates: for each photo a list of entries -> for each photo a list of beliefs, as long
    The MLLM listens, also where a CLIP retrieves. It listens as it is now: switch an adapter off.
    """
    pairs = []
    for photo, entries in zip(photos, candidates, strict=True):
        pairs += [(photo, entry.text) for entry in entries]
    beliefs = mllm.believe(pairs).tolist()
    of_photos = []
    for entries in candidates:
        of_photos.append(beliefs[: len(entries)])
        beliefs = beliefs[len(entries) :]
    return of_photos


def fits_one(beliefs, threshold):
    """Does the listener believe in any of a photo's candidates? If not, it shows a stranger."""
    return any(belief >= threshold for belief in beliefs)


# ------------------------------------------------------------------------------- the three tasks
@dataclass
class Caption:
    """What the assistant answered, for one photo, to lettered descriptions."""

    candidates: list[Entry]  # in the order of their letters
    row: dict | None  # the answer as `read_answer` read it, None where it cannot be read
    answer: str  # the answer as it stands
    # Can it be read, but for a caption that calls another name than the letter's?
    contradicts: bool = False

    @property
    def chosen(self):
        """The entry that was chosen; None where the answer cannot be read."""
        return self.candidates[LETTERS.index(self.row["Answer"])] if self.row else None

    @property
    def text(self):
        """The caption; empty where the answer cannot be read."""
        return self.row["Caption"] if self.row else ""

    def letter(self, entry):
        """The letter that stood before an entry."""
        return LETTERS[self.candidates.index(entry)]


def letter_candidates(photo, entries, seed):
    """The entries in random order (departure 2), so that A is the first of them.   -> [Entry]"""
    rng = random.Random(f"letters {seed} {photo.name}")
    return rng.sample(entries, len(entries))


def calls_another(row, candidates):
    """Does a caption call names, and not that of the letter beside it?

    One that calls another name as well does not: both things may be in the photo.
    """
    chosen = candidates[LETTERS.index(row["Answer"])]
    names = {name.lower() for name in re.findall("<[^<>]+>", row["Caption"])}
    return bool(names) and tag(chosen.name).lower() not in names


def caption(mllm, photos, candidates, max_tokens, seed):
    """Which of its candidates is the subject of each photo? And a caption that names it.

    candidates: for each photo a list of entries, which is shuffled -> [Caption] * P
    """
    orders = []
    pairs = []
    for photo, entries in zip(photos, candidates, strict=True):
        order = letter_candidates(photo, entries, seed)
        lines = []
        for letter, entry in zip(LETTERS, order, strict=False):
            lines.append(f"{letter}. {mllm.quote(entry.text)} is {tag(entry.name)}")
        orders.append(order)
        pairs.append((photo, "\n".join(lines)))
    answers = mllm.answer(CAPTIONING, pairs, max_tokens, "captioning")

    captions = []
    for order, answer in zip(orders, answers, strict=True):
        row = read_answer(answer, Answer=LETTERS[: len(order)], Caption=ANY_TEXT)
        contradicts = row is not None and calls_another(row, order)
        captions.append(Caption(order, None if contradicts else row, answer, contradicts))
    return captions


def ask(mllm, template, asked, max_tokens, progress, show_reference):
    """The answers to a template.   asked [(photo, entry, what stands for {text}), ...] -> texts

    show_reference: the entry's first photo is shown, too.
    """
    if not show_reference:
        pairs = [(photo, text) for photo, _, text in asked]
        return mllm.answer(template, pairs, max_tokens, progress)

    template = TWO_PHOTOS + re.sub(r"\bth(is|e) photo\b", "photo 1", template)
    prompts = []
    for photo, entry, text in asked:
        prompts.append(Prompt([photo, entry.photos[0]], template.replace("{text}", text)))
    return mllm.greedy(prompts, max_tokens, progress)


@dataclass
class Verdict:
    """What the assistant answered, for one photo, to a description or to a question."""

    value: bool | None  # is it that very thing, or the right option? None: it cannot be read
    answer: str  # the answer as it stands


def recognise(mllm, pairs, max_tokens, show_reference=False):
    """Does the photo show that very concept?   pairs [(photo, entry), ...] -> [Verdict]"""
    asked = [(photo, entry, mllm.quote(entry.text)) for photo, entry in pairs]
    answers = ask(mllm, RECOGNITION, asked, max_tokens, "recognition", show_reference)
    verdicts = []
    for answer in answers:
        row = read_answer(answer, Answer=YES_OR_NO)
        value = None if row is None else row["Answer"] == "Yes"
        verdicts.append(Verdict(value, answer))
    return verdicts


@dataclass(frozen=True)
class Question:
    """A question about a photo of a concept, with two options."""

    concept: str
    photo: Photo
    text: str  # {} stands for the concept's name
    options: dict[str, str]  # {letter: text}
    answer: str  # the letter of the right one


def answer_questions(mllm, questions, entry_of, max_tokens, show_reference=False):
    """Is the right option chosen?   entry_of {concept name: Entry} -> [Verdict]"""
    asked = []
    for question in questions:
        name = tag(question.concept)
        entry = entry_of[question.concept]
        # Somebody else's words, so cleaned as descriptions are, though without quotation marks.
        words = mllm.quote(question.text)[1:-1].format(name)
        lines = [f"{name}: {mllm.quote(entry.text)}", words]
        for letter, text in question.options.items():
            lines.append(f"{letter}. {mllm.quote(text)[1:-1]}")
        asked.append((question.photo, entry, "\n".join(lines)))
    answers = ask(mllm, VQA, asked, max_tokens, "answering", show_reference)

    verdicts = []
    for question, answer in zip(questions, answers, strict=True):
        row = read_answer(answer, Answer=tuple(question.options))
        value = None if row is None else row["Answer"] == question.answer
        verdicts.append(Verdict(value, answer))
    return verdicts


# ------------------------------------------------------------------------------- the command line
@dataclass
class AssistantOptions:
    """What the assistant is and how it works: the options that evaluate.py shares."""

    model: str = option(
        str(toy.FOLDER),
        "checkpoint: a folder, or a hub name such as Qwen/Qwen2-VL-2B-Instruct; default: the toy",
        metavar="DIR",
    )
    references: int = option(1, "photos described of each thing (published: 1)", least=1)
    k: int = option(K, "descriptions retrieved for a photo", least=2, most=len(LETTERS))
    threshold: float = option(
        THRESHOLD,
        "belief that one of the descriptions must reach, else the photo shows none of the things; "
        "0: it always shows one",
        least=0,
        most=1,
    )
    embedder: str = option(
        "",
        "CLIP that retrieves, such as openai/clip-vit-large-patch14-336; default: the model itself",
        metavar="CLIP",
    )
    seed: int = option(0, "seed of all that is drawn; in evaluate.py give that of the run")
    max_tokens: int = option(256, "longest description or answer, in tokens", toy=128, least=1)
    max_pixels: int = option(
        401408, "photos are shrunk to this", toy=20736, least=784, most=DETAIL**2
    )


@dataclass
class Options(AssistantOptions):
    """Every option of this script."""

    k: int = option(
        None,
        "descriptions retrieved for a photo; default 3, or all if there are fewer",
        least=2,
        most=len(LETTERS),
    )
    photo: str = option("", "the new photo", metavar="PHOTO", positional=True)
    photos: str = option(
        "", "folder of your things, a photo or a folder of photos each", metavar="DIR"
    )
    database: str = option(
        "", "their descriptions, in RAP's JSON, in the place of --photos", metavar="FILE"
    )
    adapter: str = option(
        "", "what describes --photos: a run's adapter/, or any PEFT LoRA", metavar="DIR"
    )
    out: str = option("", "write the descriptions here, for --database", metavar="FILE")


def fill_in_assistant(cls, given):
    """run.fill_in, with the defaults of the model that is given.   -> cls"""
    return run.fill_in(cls, given, toy.is_toy(given.get("model", toy.FOLDER)))


def read_settings(argv=None):
    """The command line.   -> Options"""
    given = run.read_options(Options, __doc__, argv)
    options = fill_in_assistant(Options, given)
    if not options.photo:
        raise DataError("give the new photo: python assistant.py --photos my_photos/ photo.jpg")
    if bool(options.photos) == bool(options.database):
        raise DataError("give --photos or --database, one of them")
    for name in ("adapter", "references"):
        if options.database and name in given:
            raise DataError(
                f"{run.flag(name)} is for describing --photos; a --database is described already"
            )
    if options.out and options.photos:
        check_out(options)
    return options


def check_out(options):
    """Raise DataError if the database in --out would not find its pictures again."""
    root = pathlib.Path(options.photos).resolve()
    folders = folders_around(pathlib.Path(options.out))
    if not any(root.is_relative_to(folder) for folder in folders):
        raise DataError(
            f"from {options.out} the pictures in {options.photos} could not be found again; give "
            "an --out in that folder, or above it"
        )


def check_adapter(adapter):
    """Raise DataError if there is no such adapter, before a model is loaded; "base" is none."""
    if adapter != "base":
        with one_line_errors("cannot put the adapter on", ValueError):
            read_adapter_config(find_adapter(adapter))


def adapt(mllm, adapter):
    """Put an adapter on; "base" is none. Raises DataError for one that does not fit."""
    if adapter != "base":
        with one_line_errors("cannot put the adapter on", ValueError):
            load_adapter(mllm.model, adapter)


def read_query(path):
    """The new photo. Raises DataError, with advice, if there is none to be read."""
    file = pathlib.Path(path)
    if file.is_dir():
        raise DataError(f"{path} is a folder; give one of the photos in it")
    if not file.exists():
        raise DataError(f"there is no {path}; give the new photo by its path")
    if file.suffix.lower() in VIDEO_SUFFIXES:
        raise DataError(f"{path} is a video; give a picture of it, saved as JPEG or PNG")
    photo = Photo(f"query {path}", partial(read_photo, path))
    advice = "save it again as JPEG or PNG, or give another one"
    with one_line_errors(f"cannot read the picture {path} ({advice})", *UNREADABLE):
        photo.load()
    return photo


def read_things(options):
    """Your things, before a model is loaded: of --database as they are remembered, of --photos the
    photos that will be described.   -> [Entry] or [Concept]

    Raises DataError where there are none, or fewer than --k.
    """
    if options.database:
        things = read_database(options.database)
        if not things:
            raise DataError(f"{options.database} describes nothing; make another with --photos")
    else:
        things = []
        for concept in load_concepts(options.photos, least=1):
            photos = concept.photos[: options.references]
            things.append(dataclasses.replace(concept, photos=photos))
    if options.k and options.k > len(things):
        raise DataError(f"--k {options.k}: there are only {len(things)} things; leave it out")
    return things


def remember(mllm, things, options):
    """All that the assistant will know of your things, which is kept in --out.   -> [Entry]"""
    if options.database:
        entries = things
        root = ""
    else:
        adapt(mllm, options.adapter or "base")
        entries = describe(mllm, things, options.max_tokens)
        remove_lora(mllm.model)
        root = find_folder(options.photos)

    malformed = sum(entry.malformed for entry in entries)
    if malformed:
        print(f"{malformed} descriptions are not in the form that was asked for")
    if options.out:
        write_json(options.out, database(entries, root))
    elif not options.database:
        print(
            "(to ask again without describing your things again: add --out things.json now, then "
            "give --database things.json for --photos)"
        )
    return entries


def percent(share):
    """A share with as many digits as it takes to tell small ones apart, such as "0.03 %"."""
    value = 100 * share
    if value < 0.0001:
        return "< 0.0001 %"
    return f"{value:.2g} %" if value < 1 else f"{value:.3g} %"


def show_stranger(options):
    """Print that the photo shows none of the things."""
    print(
        "\nNone of your things: the listener believes in none of these descriptions "
        f"(--threshold: {percent(options.threshold)} at least)"
    )
    if options.photos and not options.adapter:
        print(
            "If it does show one of them: a description that says what holds for one photo only, "
            "such as pose and place, fits no other; a trained --adapter leaves that out"
        )


def show_caption(answered):
    """Print a Caption, and the reason that the assistant gives."""
    if answered.row is None:
        wrong = "is not the JSON that was asked for"
        if answered.contradicts:
            wrong = "calls the thing by another name than its letter's"
        print(
            f"\nNo caption: the model's answer {wrong}, and is not guessed at. It said: "
            f"{answered.answer!r}"
        )
        return
    reason = f"because it chose {answered.row['Answer']}"
    if answered.row.get("Reasoning"):
        reason += f": {answered.row['Reasoning']}"
    print(f"\n{answered.text}\n\n{reason}")


def show_candidates(candidates, beliefs, chosen, total):
    """Print the candidates by letter, the chosen one, if any, starred."""
    print(
        f"\nthe {len(candidates)} most similar of {total} things: how much the listener believes "
        "that the description fits the photo"
    )
    width = max(len(entry.name) for entry in candidates)
    for letter, entry, belief in zip(LETTERS, candidates, beliefs, strict=False):
        star = "*" if entry == chosen else " "
        print(f"  {star}{letter} {percent(belief):>10}  {entry.name:{width}}  {entry.text}")


def main(argv=None):
    options = read_settings(argv)
    photo = read_query(options.photo)
    check_adapter(options.adapter or "base")
    if options.out:
        run.output_file(options.out)
    things = read_things(options)
    mllm = MLLM(options.model, options.max_pixels)
    mllm.check_words(tag(thing.name) for thing in things)
    embedder = Clip(options.embedder, mllm.device) if options.embedder else mllm

    entries = remember(mllm, things, options)
    [retrieved] = retrieve(embedder, [photo], entries, options.k or K)
    nearest = [found.entry for found in retrieved]
    candidates = letter_candidates(photo, nearest, options.seed)
    [beliefs] = believe(mllm, [photo], [candidates])
    chosen = None
    if fits_one(beliefs, options.threshold):
        [answered] = caption(mllm, [photo], [nearest], options.max_tokens, options.seed)
        show_caption(answered)
        chosen = answered.chosen
    else:
        show_stranger(options)
    show_candidates(candidates, beliefs, chosen, len(entries))


if __name__ == "__main__":
    run.main(main)
