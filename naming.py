"""naming.py: how RePIC is measured: do captions call things by the names that they were given?

The model is shown a reference picture of each thing, with its name and what is known of it, and
then the query picture: of one thing, of two or of four. It writes a caption, *with* its adapter on,
and names are looked for in it. Each model is a row, "base" the one as it came; each row has three
kinds of references:

    right       exactly the things that are in the picture, in the order of the database: the
                "skip-retrieval" of RePIC's tables
    retrieved   the k of the database whose pictures look most like it
    wrong       as many that are not in the picture, whose names should *not* be used (Table 3)

RePIC's pictures, queries and databases are read as they are distributed (github.com/oyt9306/RePIC;
its data page says where to get the pictures). --protocol says which of its tables it is:

    python naming.py --model Qwen/Qwen2.5-VL-7B-Instruct --protocol two
        --queries data/query-image-2-concepts/ --database data/database_tot/database_2_concepts/
        --adapter runs/repic/adapter --out names.json

The result is a Markdown table on the screen and, with --out, JSON on disk, with every caption. A
row is kept there as soon as it is done, and the same command goes on with those that are missing.
Columns:

    precision, recall, F1   of names in captions (see `name_grounding`); of wrong references, too:
                            their names count there, so less is better
    in brackets             names that are there as the prompt has them, in angle brackets
    matched                 toy only: of the right names that are said, how many stand in a
                            sentence that is true of the thing that is called so
    ceiling                 names that are among the references: recall can hardly be better
    characters              the mean length of a caption

evaluate.py --grounding measures the same with any folder of photos, and collages of them.

Source: RePIC (arXiv 2506.18369): sections 4 and 4.1, Tables 1 to 4, A.2 and A.3, and its code.

Where it departs from the paper and its research code:
1. What their system message says stands at the beginning of the user's turn, in our own words.
2. What is known of a thing is put between quotation marks and loses its angle brackets.
3. Whole pictures are compared. (Theirs are the boxes that YOLO-World finds; a picture without any
   has no references.) In a collage each photo is looked up on its own.
4. Greedy is plain. (Theirs follows the checkpoint, and Qwen2.5-VL's asks for a repetition penalty,
   which discourages the names that a prompt has.)
5. The questions are those of Table A.3 everywhere. (In one of them the code says "of" for "for".
   Its scripts for two and four things have three others, but the captions that were released with
   them do not.)
6. The model as it came is asked for the name by one sentence, that of the code. (The captions that
   were released say "using its given names" for two things, and nothing for four.) So are speakers
   of the game, who were not taught to say names either.
7. How Table 3's wrong references were chosen is not published. Here they are drawn, and for two and
   four things as well.
8. The toy world is asked as in repic.py, in the only wordings that its model knows: without what is
   known of things.
9. evaluate.py --grounding is a smaller measure, of any photos: one reference is retrieved for each
   thing in a picture, by the model's own tower unless --embedder names a CLIP, right ones come in
   the order in which they were drawn, and captions end where its other answers do.

Shapes: P pictures, C references in the database, k retrieved.
"""

import dataclasses
import pathlib
import random
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

import run
import toy
from assistant import (
    Entry,
    adapt,
    find_photo,
    picture_similarity,
    published_form,
    read_database,
)
from data import (
    PHOTO_SUFFIXES,
    DataError,
    Photo,
    natural,
    one_line_errors,
    read_photo,
    tag,
)
from lora import find_adapter, read_adapter_config, remove_lora
from model import MLLM, PICTURE, Clip, Prompt
from repic import ASK_FOR_NAME, PROMPTS, collage, introduce
from rrg import picture_side
from run import option
from tables import ANSWER, KeptTable, Progress, digest_of_files, speaker_of

REFERENCES = ("right", "retrieved", "wrong")
SCENES = 60  # pictures of one thing, as many of two and of four, for evaluate.py --grounding
DATABASE = "database_mod.json"  # what RePIC's own script reads in the folder of a database


# ----------------------------------------------------------------------------------- the protocols
@dataclass(frozen=True)
class Protocol:
    """What RePIC does with one of its sets of pictures."""

    concepts: int  # things that a query is about
    k: int  # references that are retrieved
    case_sensitive: bool  # <Bo> is not <bo>
    source: str


SINGLE = Protocol(
    concepts=1,
    k=2,
    case_sensitive=False,
    source="Tables 1 and 3; caption_eval_single.py, eval_single_concept.py",
)
PROTOCOLS = {
    "myvlm": SINGLE,
    "yollava": SINGLE,
    "dreambooth": SINGLE,  # whose queries are all photos there are, so one may be the reference
    "two": Protocol(
        concepts=2,
        k=2,
        case_sensitive=True,
        source="Tables 2, 4 and A.2; caption_eval_multi_2.py, eval_multi_2_concept.py",
    ),
    "four": Protocol(
        concepts=4,
        k=4,
        case_sensitive=False,
        source="Table 2; caption_eval_multi_4.py, eval_multi_4_concept.py",
    ),
}
BY_COUNT = {1: SINGLE, 2: PROTOCOLS["two"], 4: PROTOCOLS["four"]}


# ---------------------------------------------------------------------------------- what is asked
INTRODUCTION = (
    "You write captions. Your task is an accurate caption of the query image. The reference images "
    "come first, each with what is known of it.\n"
)
QUESTIONS = (  # Table A.3, "General Caption Template", word for word
    "Give a personalized caption of this image.",
    "Give a caption of the image.",
    "Can you provide a personalized caption for this photo?",
    "Provide a caption of the given image.",
)


# ------------------------------------------------------------------------- how RePIC is measured
def words_of(caption):
    """The words of a caption, split at white space and without punctuation at either end."""
    words = caption.replace("</s>", "").split()
    return {word.strip(".,!?;:()[]{}\"'-") for word in words}


def name_grounding(rows, case_sensitive=False):
    """Do captions call things by their names? The rule of RAP and RePIC.

    rows [(names that belong there, caption), ...] -> {"precision", "recall", "f1"}

    A name is there if a word equals it, bare or as <name>. If <bo> belongs in a caption, one that
    says <bo> is a hit; one that does not, but says a name of these rows that does not belong
    there, is a miss; one without any name is neither and only lowers the recall.

        precision = hits / (hits + misses)        recall = hits / names that belong

    RePIC's tables of two concepts are case-sensitive, those of one and four are not.
    """
    captions = []  # (names that belong there, without brackets, the caption)
    for names, caption in rows:
        if not case_sensitive:
            names = [name.lower() for name in names]
            caption = caption.lower()
        bare = [name.removeprefix("<").removesuffix(">") for name in names]
        captions.append((bare, caption))
    all_names = {name for names, _ in captions for name in names}

    hits = 0
    misses = 0
    slots = 0  # names that belong
    for names, caption in captions:
        words = words_of(caption)
        there = {name for name in all_names if name in words or f"<{name}>" in words}
        right = sum(name in there for name in names)
        hits += right
        slots += len(names)
        if there - set(names):  # a name that does not belong there
            misses += len(names) - right

    precision = hits / max(1, hits + misses)
    recall = hits / max(1, slots)
    f1 = 2 * precision * recall / max(1e-12, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1}


def recall_in_brackets(rows, case_sensitive=False):
    """How many names are in captions as a prompt has them, in angle brackets, wherever they stand.

    rows [(names as they were shown, caption), ...] -> fraction
    By the rule above a name of several words can never be there, nor one that is shown in another
    spelling than it counts in: 96 of the 420 names of RePIC's four things.
    """
    there = []
    for names, caption in rows:
        for name in names:
            marker = f"<{name}>"
            if case_sensitive:
                there.append(marker in caption)
            else:
                there.append(marker.lower() in caption.lower())
    return sum(there) / max(1, len(there))


def share_matched(scenes, captions):
    """Of the names of what a picture shows that its caption says, how many stand in a sentence that
    tells the truth about the thing so called?

    -> fraction; None where none is said, or the truth is not known
    """
    holds = []
    for scene, caption in zip(scenes, captions, strict=True):
        for sentence in caption.split("."):
            for name, photo in scene.shows.items():
                if photo.truth and f"<{name}>" in sentence:
                    holds.append(toy.tells_truth(sentence, photo.truth))
    return sum(holds) / len(holds) if holds else None


# -------------------------------------------------------------------------- queries and databases
@dataclass(frozen=True)
class Query:
    """A picture, and the names of what is in it."""

    photo: Photo
    names: list[str]


def queries_in_folders(root):
    """RAP's folders <A>_and_<B>/ of photos.   -> [Query]"""
    queries = []
    for file in sorted(root.rglob("*_and_*/*"), key=natural):
        if file.suffix.lower() in PHOTO_SUFFIXES:
            photo = Photo(str(file.relative_to(root)), partial(read_photo, file))
            queries.append(Query(photo, file.parent.name.split("_and_")))
    return queries


def load_queries(path):
    """Pictures of one concept or several, in the two forms they are published in.   -> [Query]

    A folder of RAP's <A>_and_<B>/ folders, or RePIC's JSON, {path: [name, ...]} or
    {path: [[name, ...], ...]}. Raises DataError for JSON in another form, and for a picture that
    it names and that cannot be found.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return queries_in_folders(path)
    content = run.load_json(path)
    queries = []
    with published_form("the list of pictures of several things"):
        for image, names in content.items():
            groups = names if names and isinstance(names[0], list) else [names]
            for group in groups:
                bare = [name.strip("<>") for name in group]
                queries.append(Query(find_photo(image, path), bare))
    return queries


@dataclass(frozen=True)
class Reference(Entry):
    """What is shown of a thing: its first picture, its name and what is known of it."""

    shown: str = ""  # the name as the prompt has it: "Iron Man", of whose name "ironman" counts


def load_references(path):
    """RePIC's database, by its file or its folder.   -> [Reference]

    Raises DataError as `read_database` does.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / DATABASE
    entries = read_database(file)
    items = run.load_json(file)["concept_dict"].values()
    references = []
    for entry, item in zip(entries, items, strict=True):
        shown = str(item.get("name") or entry.name).strip("<>")
        references.append(
            Reference(entry.name, entry.category, entry.photos, entry.text, shown=shown)
        )
    return references


def check_queries(queries, references, options):
    """Raise DataError where queries, database and protocol do not belong together."""
    if not queries:
        raise DataError(
            f"{options.queries} has no pictures; wanted: RePIC's list of them in JSON, or a folder "
            "of folders <A>_and_<B>/"
        )
    count = PROTOCOLS[options.protocol].concepts
    known = {reference.name for reference in references}
    for query in queries:
        if len(query.names) != count:
            raise DataError(
                f"--protocol {options.protocol} is for pictures of {count}, but {query.photo.name} "
                f"has {len(query.names)} names; give another --protocol or other --queries"
            )
        for name in query.names:
            if name not in known:
                raise DataError(
                    f"{options.database} does not have {name}, which is in {query.photo.name}; "
                    "give the --database that belongs to these --queries"
                )
    if options.k > len(references):
        raise DataError(
            f"--k {options.k} is more than the {len(references)} things in {options.database}"
        )


def check_given_once(flag, values):
    """Raise DataError where an option that may be given several times names something twice."""
    seen = set()
    for value in values:
        place = pathlib.Path(value).resolve()
        if place in seen:
            raise DataError(f"{flag} {value} is given twice; leave one out")
        seen.add(place)


def check_adapters(folders):
    """Raise DataError for what is no adapter, before a model is loaded."""
    check_given_once("--adapter", folders)
    for folder in folders:
        with one_line_errors("cannot put the adapter on", ValueError):
            read_adapter_config(find_adapter(folder))


# ------------------------------------------------------------------------------------- the scenes
@dataclass
class Scene:
    """A picture that is to be captioned, and each kind of references that it can be shown with."""

    picture: Photo
    references: dict[str, list[Reference]]  # {one of REFERENCES: those that are shown, in order}
    # {name: the photo of it that the picture is made of}; of a picture that is no collage empty
    shows: dict[str, Photo] = field(default_factory=dict)

    def wanted(self, how):
        """The references whose names are looked for in the caption: of wrong ones their own."""
        return self.references["wrong" if how == "wrong" else "right"]


def most_alike(embedder, photos, references, k):
    """The k references whose pictures look most like each photo.   -> {Photo: [Reference] * k}

    embedder: an MLLM, or a Clip. Best first.
    """
    similarity = picture_similarity(embedder, photos, references)  # [P, C]
    best = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]  # [P, k]
    alike = {}
    for photo, places in zip(photos, best.tolist(), strict=True):
        alike[photo] = [references[place] for place in places]
    return alike


def scenes_of(embedder, queries, references, k, seed):
    """RePIC's queries with their references.   -> [Scene]

    Of a group photo each query names some. What any of them names is in the picture, so it is no
    wrong reference. Raises DataError for a picture that shows the whole database.
    """
    photos = list(dict.fromkeys(query.photo for query in queries))
    retrieved = most_alike(embedder, photos, references, k)
    in_picture = defaultdict(set)  # {Photo: names}
    for query in queries:
        in_picture[query.photo] |= set(query.names)

    scenes = []
    for number, query in enumerate(queries):
        absent = [each for each in references if each.name not in in_picture[query.photo]]
        if not absent:
            raise DataError(
                f"{query.photo.name} shows everything in the database, so no reference is wrong; "
                "give the whole --database"
            )
        rng = random.Random(f"wrong references {seed} {number}")
        drawn = rng.sample(absent, min(len(absent), len(query.names)))
        choice = {
            "right": [each for each in references if each.name in query.names],
            "retrieved": retrieved[query.photo],
            "wrong": [each for each in absent if each in drawn],
        }
        scenes.append(Scene(query.photo, choice))
    return scenes


# ------------------------------------------------------------------------------------ one setting
# The figures, and how the table calls them.
FIGURES = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "recall_in_brackets": "in brackets",
    "matched": "matched",
    "ceiling": "ceiling",
    "characters": "characters",
}


def message(mllm, references, question):
    """The text of a prompt, in RePIC's layout, which says where each picture stands.

    1. Name: <bo>, Info: "A dog."
    """
    text = INTRODUCTION
    for number, reference in enumerate(references, start=1):
        name = mllm.quote(reference.shown).strip('"')  # so that it is no marker either
        text += f"{PICTURE}{number}. Name: <{name}>"
        if reference.text:
            text += f", Info: {mllm.quote(reference.text)}"
        text += "\n"
    return f"{text}{PICTURE}This is the query image. {question}"


def taught_names(name):
    """Has a row's model been taught to say names?

    name: "base", or an adapter; one whose run is not known has, as RePIC's published one
    """
    return name != "base" and run.run_record(name).get("method") != "rrg"


def naming_prompt(mllm, picture, references, number, zero_shot):
    """What the model is asked about picture `number`: the wordings take turns.   -> Prompt

    This is the place that knows of the toy world, whose photos tell the truth (departure 8).
    zero_shot: the model has not been taught to say names, so a sentence asks for them
    """
    photos = [reference.photos[0] for reference in references] + [picture]
    if photos[0].truth:
        template = PROMPTS["ict"][number % len(PROMPTS["ict"])]
        names = [f"<{reference.shown}>" for reference in references]
        asked = introduce(template, names)
        return Prompt(photos, f"{asked} {ASK_FOR_NAME}" if zero_shot else asked)

    question = QUESTIONS[number % len(QUESTIONS)]
    if zero_shot:
        question += " " + ASK_FOR_NAME
    return Prompt(photos, message(mllm, references, question))


def measure(mllm, scenes, how, case_sensitive, zero_shot, max_tokens):
    """Caption each scene with one kind of references, by the model as it is now.

    -> ({figure: value, see FIGURES}, [what was asked and answered])
    """
    prompts = []
    for number, scene in enumerate(scenes):
        references = scene.references[how]
        prompts.append(naming_prompt(mllm, scene.picture, references, number, zero_shot))
    captions = mllm.greedy(prompts, max_tokens, f"captioning with {how} references")

    rows = []  # (names that count, caption)
    rows_as_shown = []  # (names as they were shown, caption)
    among = []  # is a name among the references?
    records = []
    for scene, prompt, caption in zip(scenes, prompts, captions, strict=True):
        references = scene.references[how]
        wanted = scene.wanted(how)
        names = [reference.name for reference in wanted]
        rows.append((names, caption))
        rows_as_shown.append(([reference.shown for reference in wanted], caption))
        among += [reference in references for reference in wanted]
        record = {
            "picture": scene.picture.name,
            "names": names,
            "references": [reference.name for reference in references],
            "prompt": prompt.text,
            "caption": caption,
        }
        records.append(record)
    figures = name_grounding(rows, case_sensitive) | {
        "recall_in_brackets": recall_in_brackets(rows_as_shown, case_sensitive),
        "matched": share_matched(scenes, captions),
        "ceiling": sum(among) / len(among),
        "characters": sum(len(caption) for caption in captions) / len(captions),
    }
    return figures, records


# ----------------------------------------------------------------- any photos (--grounding)
def references_of(part, splits, info):
    """The first reference photo of each known concept.   -> {concept name: Reference}

    info {concept name: its description}
    """
    references = {}
    for concept in part.known:
        name = tag(concept.name).strip("<>")
        photos = splits[concept.name].references[:1]
        text = info.get(concept.name, "")
        references[concept.name] = Reference(name, concept.category, photos, text, shown=name)
    return references


def draw_scene(part, splits, references, alike, count, number, side, seed):
    """Picture `number` of `count` concepts; one of several is a collage.   -> Scene

    references {concept name: Reference}; alike {test photo: [the Reference most like it]}
    """
    rng = random.Random(f"scene {seed} {count} {number}")
    names = [concept.name for concept in rng.sample(part.tested, count)]
    photos = [rng.choice(splits[name].tests) for name in names]
    absent = [concept.name for concept in part.known if concept.name not in names]
    others = rng.sample(absent, count)
    picture = photos[0]
    if count > 1:
        picture, _ = collage(photos, side, number)

    retrieved = []
    for photo in photos:
        [reference] = alike[photo]
        if reference not in retrieved:  # two photos may have the same one
            retrieved.append(reference)
    choice = {
        "right": [references[name] for name in names],
        "retrieved": retrieved,
        "wrong": [references[name] for name in others],
    }
    shows = {references[name].shown: photo for name, photo in zip(names, photos, strict=True)}
    return Scene(picture, choice, shows)


def grounding(mllm, embedder, part, splits, info, zero_shot, options):
    """Does the model, as it is now, call concepts by their names?   (RePIC, tables 1 to 3)

    info {concept name: description}; zero_shot: it has not been taught to (`taught_names`)
    -> ({"names_<count>_<references>_<figure>": value}, [what was asked and answered]); a value is
    None where there are too few concepts
    """
    references = references_of(part, splits, info)
    photos = []
    for concept in part.tested:
        photos += splits[concept.name].tests
    alike = most_alike(embedder, photos, list(references.values()), 1)
    side = picture_side(mllm)

    figures = {}
    records = []
    for count, protocol in BY_COUNT.items():
        scenes = []
        if has_enough(part, count):
            for number in range(SCENES):
                scene = draw_scene(
                    part, splits, references, alike, count, number, side, options.seed
                )
                scenes.append(scene)
        for how in REFERENCES:
            found = dict.fromkeys(FIGURES)
            if scenes:
                found, captions = measure(
                    mllm, scenes, how, protocol.case_sensitive, zero_shot, options.max_tokens
                )
                about = {"things": count, "how": how}
                records += [about | record for record in captions]
            for figure, value in found.items():
                figures[f"names_{count}_{how}_{figure}"] = value
    return figures, records


def has_enough(part, count):
    """Are there pictures of so many things, and as many others?"""
    return len(part.tested) >= count and len(part.known) >= 2 * count


def grounding_work(part):
    """How many captions `grounding` asks for."""
    counts = [count for count in BY_COUNT if has_enough(part, count)]
    return len(counts) * len(REFERENCES) * SCENES


def grounding_columns():
    """{figure: how the table calls it}"""
    columns = {}
    for count in BY_COUNT:
        noun = "name" if count == 1 else "names"
        for how in REFERENCES:
            columns[f"names_{count}_{how}_f1"] = f"{count} {noun}, {how}"
    return columns


GROUNDING = grounding_columns()


# ------------------------------------------------------------------------------- the command line
@dataclass
class Options:
    """Every option of this script."""

    model: str = option("", "checkpoint; RePIC's is Qwen/Qwen2.5-VL-7B-Instruct", metavar="DIR")
    protocol: str = option("", "which of RePIC's sets of pictures", choices=tuple(PROTOCOLS))
    queries: str = option(
        "",
        "the pictures: RePIC's data/query_tot/*.json, or a folder of folders <A>_and_<B>/",
        metavar="PATH",
    )
    database: str = option(
        "", "the references: the folder in RePIC's data/database_tot/, or a file", metavar="PATH"
    )
    adapter: list = option(
        [],
        "a run's adapter/, or any PEFT LoRA: a row of the table; may be given several times",
        metavar="DIR",
    )
    k: int = option(2, "references retrieved for a picture; --protocol four: 4", least=1)
    embedder: str = option(
        "openai/clip-vit-large-patch14-336",
        'CLIP that retrieves; "": the model itself; default: openai/clip-vit-large-patch14-336',
        metavar="CLIP",
    )
    seed: int = option(0, "seed by which wrong references are drawn")
    max_tokens: int = option(1024, "longest caption, in tokens", least=1)
    max_pixels: int = option(1024 * 28 * 28, "pictures are shrunk to this", least=784)
    out: str = option("", "write the table and all captions here as JSON", metavar="FILE")


def read_settings(argv=None):
    """The command line.   -> Options"""
    given = run.read_options(Options, __doc__, argv)
    for name in ("model", "protocol", "queries", "database"):
        if not given.get(name):
            raise DataError(f"give {run.flag(name)}; python naming.py --help has an example")
    settings = {"k": PROTOCOLS[given["protocol"]].k} | given
    return run.fill_in(Options, settings, is_toy=False)


def caption_row(mllm, name, scenes, options, progress):
    """Caption all scenes with an adapter on, in three ways.   -> {references: figures, captions}"""
    adapt(mllm, name)
    case_sensitive = PROTOCOLS[options.protocol].case_sensitive
    row = {}
    for how in REFERENCES:
        with progress.part(name, how):
            figures, records = measure(
                mllm, scenes, how, case_sensitive, not taught_names(name), options.max_tokens
            )
        row[how] = figures | {"captions": records}
    remove_lora(mllm.model)
    return row


def settings_of(options):
    """What all rows of a table are measured with.   -> {option: value}

    Pictures and databases count by their content, wherever they lie.
    """
    elsewhere = ("adapter", "queries", "database", "out")
    names = [option.name for option in dataclasses.fields(options)]
    return {name: getattr(options, name) for name in names if name not in elsewhere}


def content_of(queries, references, folder):
    """All that rows are measured with, as JSON can hold it.   folder: --queries"""
    pictures = {}  # {picture: hash of its file}
    for query in queries:
        # Its name is its path, if need be below the folder of the queries.
        picture = query.photo.name
        if picture not in pictures:
            pictures[picture] = digest_of_files(pathlib.Path(folder) / picture)
    asked = [[pictures[query.photo.name], query.names] for query in queries]
    known = []
    for reference in references:
        picture = digest_of_files(reference.photos[0].name)
        known.append([reference.name, reference.shown, reference.text, picture])
    return [asked, known]


def table(mllm, embedder, queries, references, options):
    """A row for base and for each adapter, each kept as soon as it is done; those that --out has
    already are taken from there.

    embedder: the MLLM, or a Clip -> the content of --out, "rows" {name: {references: figures}}
    """
    kept = KeptTable(options.out, settings_of(options))
    facts = {
        "protocol": options.protocol,
        "source": PROTOCOLS[options.protocol].source,
        "k": options.k,
        "queries": len(queries),
        "database": len(references),
        "device": run.machine(mllm.device),
    }
    kept.measure_with(content_of(queries, references, options.queries), facts)
    names = ["base", *options.adapter]
    speakers = {}
    plan = {}
    for name in names:
        speakers[name] = speaker_of(mllm, options.model, "" if name == "base" else name)
        if kept.has(name, speakers[name]):
            print(f"{name}: done before, in {options.out}")
            continue
        for how in REFERENCES:
            plan[name, how] = len(queries) * ANSWER

    scenes = []
    if plan:
        scenes = scenes_of(embedder, queries, references, options.k, options.seed)
    with Progress(mllm, plan) as progress:
        for name in dict.fromkeys(name for name, _ in plan):
            progress.say(f"captioning by {name}")
            row = caption_row(mllm, name, scenes, options, progress)
            kept.add(name, speakers[name], row)
    return kept.content(names)


def cell(figure, value):
    """One figure in words."""
    if value is None:
        return "-"
    return f"{value:.0f}" if figure == "characters" else f"{value:.1%}"


def show(result):
    """Print the rows as Markdown."""
    print(
        f"\n{result['queries']} queries, {result['database']} things in the database, "
        f"{result['k']} retrieved (RePIC: {result['source']})\n"
    )
    heading = ["", "references", *FIGURES.values()]
    print(f"| {' | '.join(heading)} |")
    print("|---" * len(heading) + "|")
    for name, row in result["rows"].items():
        for how, figures in row.items():
            cells = [cell(figure, figures[figure]) for figure in FIGURES]
            print(f"| {' | '.join([name, how, *cells])} |")


def main(argv=None):
    options = read_settings(argv)
    if options.out:
        run.output_file(options.out)
        KeptTable(options.out, settings_of(options))  # one of other settings is noticed now
    check_adapters(options.adapter)
    queries = load_queries(options.queries)
    references = load_references(options.database)
    check_queries(queries, references, options)

    mllm = MLLM(options.model, options.max_pixels)
    for adapter in options.adapter:  # one that does not fit is noticed before the work
        adapt(mllm, adapter)
        remove_lora(mllm.model)
    mllm.check_words([INTRODUCTION, *QUESTIONS, ASK_FOR_NAME])
    embedder = Clip(options.embedder, mllm.device) if options.embedder else mllm
    show(table(mllm, embedder, queries, references, options))


if __name__ == "__main__":
    run.main(main)
