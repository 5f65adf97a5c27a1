"""Inputs of the benchmarks: prompts of real text, a tokenizer, a model, and functions that time calls.

Nothing is downloaded: the tokenizer is trained on the prompts, and the model has random weights. The speedup depends on
the prefixes that the prompts share, not on the weights.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 4096
"""The maximum vocabulary size of the tokenizer."""

PAD = "<pad>"

MAX_QUESTIONS = 10_000
"""The maximum number of few-shot prompts."""

MAX_PASSAGES = 1_000
"""The maximum number of reranking passages per query."""

FEW_SHOT_INSTRUCTION = """\
Solve the word problem in short steps, then give the number after "Answer:".

Question: A baker fills 6 trays with 14 rolls each and drops 9 of them. How many rolls reach the shop?
Steps: The trays hold 6 * 14 = 84 rolls. Without the dropped ones, 84 - 9 = 75 are left.
Answer: 75

Question: Ines reads 18 pages every evening and has 180 pages to go. How many evenings does she need?
Steps: At 18 pages an evening, that takes 180 / 18 = 10 evenings.
Answer: 10

Question: A ferry carries 45 cars and sails 8 times a day, on Sundays 3 times less. How many cars cross on a Sunday?
Steps: On Sundays it sails 8 - 3 = 5 times, with 5 * 45 = 225 cars.
Answer: 225

Question: Tomasz mixes 3 parts of syrup with 7 parts of water. How many millilitres of 2000 are syrup?
Steps: Of 3 + 7 = 10 parts, each is 2000 / 10 = 200, so syrup makes up 3 * 200 = 600.
Answer: 600

Question: Of 120 pencils a third go to one class and half of the rest to another. How many stay behind?
Steps: The first takes 120 / 3 = 40 of them, the second 80 / 2 = 40, and 40 stay.
Answer: 40

Question: A hiker climbs for 3 hours at 4 kilometres an hour and returns at 6. How long is she out?
Steps: The climb is 3 * 4 = 12 kilometres, the return 12 / 6 = 2 hours, together 3 + 2 = 5.
Answer: 5

Question: Four friends share a taxi for 38 euros and leave a tip of 6. What does each of them pay?
Steps: With the tip it costs 38 + 6 = 44 euros, and 44 / 4 = 11.
Answer: 11

Question: A tank of 500 litres lacks 300. A pump adds 25 litres a minute. When is the tank full?
Steps: At 25 litres a minute, 300 / 25 = 12 minutes.
Answer: 12

"""

# Templates of questions, and the range of {c}; {a} is small, and {b} is between 11 and 19.
_FEW, _MANY = (3, 20), (100, 400)
_QUESTIONS = (
    ("{name} buys {a} pens at {b} cents each and pays with {c} cents too much. How much was handed over?", _FEW),
    ("A train with {a} carriages has {b} seats in each, and {c} of all the seats are taken. How many are free?", _FEW),
    ("{name} plants {a} rows of {b} tulips, but the frost kills {c} of them. How many tulips bloom in spring?", _FEW),
    ("There are {b} chairs in each of {a} rows. After {c} guests sit down, how many chairs are empty?", _FEW),
    ("On Monday {name} cycles {b} kilometres, and on each of the next {a} days {c} more. How far is that?", _FEW),
    ("Every week {name} saves {b} euros. A camera costs {c} more than {a} weeks of saving. How much is it?", _MANY),
    ("If a printer makes {b} pages a minute, how many good ones has it made after {a} minutes, {c} being bad?", _FEW),
    ("The library lends out {a} boxes of {b} books. By Friday {c} books are back. How many are still out?", _FEW),
    ("From a rope of {c} metres {name} cuts {a} pieces of {b} metres each. How many metres remain?", (200, 400)),
    ("An orchard has {a} trees that each give {b} kilos of pears. {name} sells {c} kilos. How many are left?", _FEW),
    ("Both of {name}'s buckets hold {b} litres. How often must they be filled to carry {c} litres?", _MANY),
    ("Last year the club had {c} members. Since then {b} joined and {a} left. How many does it have today?", _MANY),
    ("{name} bakes {c} muffins and packs them into boxes of {a}. How many do not fit into a full box?", _MANY),
    ("When {a} painters need {b} hours for a fence of {c} metres, how many hours would one painter need?", _MANY),
    ("Half of the {c} visitors came by bus, and each bus brought {b} or fewer. How many buses were needed?", _MANY),
    ("Starting with {c} marbles, {name} gives {a} of them to each of {b} friends. How many remain?", (200, 400)),
)
_NAMES = ("Aiko", "Bram", "Chidi", "Dalia", "Emre", "Freya", "Goran", "Hana", "Ivo", "Jamila", "Kofi", "Lena", "Marek")

RERANK_INSTRUCTION = """\
Judge whether the passage answers the query. A passage that only mentions the subject of the query does not answer it; \
it has to state what was asked for. Reply with "yes" or "no".

"""

# For each subject: the question, and statements of which some answer it.
_SUBJECTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "why bread dough has to rest before it is shaped",
        (
            "Resting lets the gluten relax, so that the dough can be stretched without springing back.",
            "A dough that was kneaded by hand is usually softer than one that was kneaded by a machine.",
            "During the first rest the flour goes on taking up water, which makes the dough less sticky.",
        ),
    ),
    (
        "how lighthouses are told apart from the sea",
        (
            "Every lighthouse along a coast flashes in its own rhythm, which sailors look up in a list of lights.",
            "By day the tower's stripes and colours serve as its mark, and at night the pattern of its flashes.",
            "Many lighthouses have been automatic since the last century, and few still have a keeper.",
        ),
    ),
    (
        "what makes leaves change colour in autumn",
        (
            "As days shorten the green pigment breaks down, and the yellow pigments that it had hidden show through.",
            "The red of maples is made anew in autumn from the sugar that is left in the leaf.",
            "A wet spring may delay the first coloured leaves by a week or two.",
        ),
    ),
    (
        "how deep the foundation of a garden wall should be",
        (
            "For a wall of up to a metre, a concrete strip half a metre deep lies below the frost in mild regions.",
            "Dry stone walls need no mortar and drain well, which is why they last on slopes.",
            "On clay the trench should be deeper than on gravel, because clay swells and shrinks with the seasons.",
        ),
    ),
    (
        "why old maps show California as an island",
        (
            "An early account of the gulf was misread, and engravers copied the island from each other for a century.",
            "Maps were costly, and a printing plate was often used for decades after its errors were known.",
            "A missionary who walked from the mainland to the coast finally proved that it was a peninsula.",
        ),
    ),
    (
        "when to prune apple trees",
        (
            "Apple trees are best pruned in late winter, while they are dormant and the worst frost is over.",
            "A light cut in summer slows down a tree that grows too strongly.",
            "Apples keep longest in a cool cellar, in a single layer, away from potatoes.",
        ),
    ),
    (
        "how a mechanical watch keeps time",
        (
            "A balance wheel swings back and forth on a fine spring, and each swing lets one tooth of a gear pass.",
            "The mainspring drives the gears, while the escapement meters out its force in equal steps.",
            "Watches with a display of the moon became popular again in recent years.",
        ),
    ),
    (
        "why the sea is salty and rivers are not",
        (
            "Rivers carry traces of salt from rock to the sea, where the water evaporates and the salt stays behind.",
            "A river's water is replaced within weeks, so that salt never builds up in it.",
            "Salt was won from the sea in shallow ponds along many warm coasts.",
        ),
    ),
    (
        "how bees find their way back to the hive",
        (
            "Bees steer by the position of the sun and by the pattern of polarised light in the sky.",
            "Close to home they rely on landmarks that they learned on their first flights, and on scent.",
            "A strong colony has some fifty thousand bees in early summer.",
        ),
    ),
    (
        "what causes the echo in a large hall",
        (
            "Sound returns from hard walls, and when it comes back late enough it is heard as a separate echo.",
            "Curtains and upholstered seats swallow sound, so that a full hall echoes less than an empty one.",
            "The oldest concert halls were built as long narrow boxes.",
        ),
    ),
    (
        "how to remove rust from a cast iron pan",
        (
            "Scrub the rust off with steel wool, dry the pan on the stove, rub it with oil and bake it for an hour.",
            "A weak bath of vinegar loosens rust, but the pan must not stay in it for longer than necessary.",
            "Cast iron heats up slowly and holds its heat for a long time.",
        ),
    ),
    (
        "why trains need more distance to brake than cars",
        (
            "Steel wheels on steel rails have little grip, which limits how hard a train can brake at all.",
            "A loaded goods train may weigh as much as a thousand cars, all of which has to be brought to rest.",
            "Night trains have returned to many lines that had given them up.",
        ),
    ),
)
_PHRASINGS = ("Explain {}.", "I would like to know {}.", "Can anyone say {}?", "In plain words, {}?")


def few_shot_prompts(n: int, examples: int = 8) -> list[str]:
    """Return `n` prompts with different questions, which share an instruction and worked examples (at most eight)."""
    return [few_shot_prompt(question, examples) for question in _questions(n)]


def few_shot_prompt(question: str, examples: int = 8) -> str:
    """Return a prompt with the shared instruction and examples, and the question."""
    shared = "\n\n".join(FEW_SHOT_INSTRUCTION.split("\n\n")[: examples + 1])
    return f"{shared.rstrip()}\n\nQuestion: {question}\nSteps:"


def _questions(n: int) -> list[str]:
    """Return `n` different questions, the same in every call."""
    if n > MAX_QUESTIONS:
        raise ValueError(f"there are only {MAX_QUESTIONS} different questions, not {n}")
    rng = random.Random(0)
    questions: dict[str, None] = {}
    for template, c_range in itertools.cycle(_QUESTIONS):
        if len(questions) == n:
            break
        a, b, c = rng.randint(2, 9), rng.randint(11, 19), rng.randint(*c_range)
        questions[template.format(name=rng.choice(_NAMES), a=a, b=b, c=c)] = None
    return list(questions)


def rerank_prompts(queries: int, passages_per_query: int) -> list[str]:
    """Return prompts with a shared instruction, a query and a passage, sorted by query.

    All prompts share the instruction; the prompts of a query also share the query.
    """
    max_queries = len(_SUBJECTS) * len(_PHRASINGS)
    if queries > max_queries:
        raise ValueError(f"there are only {max_queries} different queries, not {queries}")
    if passages_per_query > MAX_PASSAGES:
        raise ValueError(f"there are only {MAX_PASSAGES} different passages for a query, not {passages_per_query}")
    all_statements = [statement for _, statements in _SUBJECTS for statement in statements]
    prompts = []
    for index in range(queries):
        rng = random.Random(index)
        subject, statements = _SUBJECTS[index % len(_SUBJECTS)]
        query = _PHRASINGS[index // len(_SUBJECTS)].format(subject)
        passages: dict[str, None] = {}
        while len(passages) < passages_per_query:
            relevant = rng.choice(statements)
            passage = [relevant, *rng.sample([other for other in all_statements if other != relevant], 2)]
            rng.shuffle(passage)
            passages[" ".join(passage)] = None
        prompts += [f"{RERANK_INSTRUCTION}Query: {query}\nPassage: {passage}\nReply:" for passage in passages]
    return prompts


def load_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a JSONL file in the order of its lines.

    Each line is an object with a string "prompt", or a string "question", which is appended to the few-shot
    instruction. Blank lines are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is not such an object. The message has the file and the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: is not UTF-8 text") from error
    prompts = []
    for number, line_text in enumerate(text.split("\n"), start=1):
        if line_text.strip():
            try:
                prompts.append(_prompt(line_text))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}:1: holds no prompts")
    return prompts


def _prompt(line: str) -> str:
    """Return the prompt of one line of JSON."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("is not readable JSON: it is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError('is not an object with a "prompt" or a "question"')
    for field in ("prompt", "question"):
        if field in record:
            value = record[field]
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f'"{field}" is not a string with text in it')
            try:
                value.encode()  # JSON can contain half of a surrogate pair, which tokenizers reject
            except UnicodeEncodeError as error:
                raise ValueError(f'"{field}" is not valid Unicode') from error
            return value if field == "prompt" else few_shot_prompt(value)
    raise ValueError('has neither a "prompt" nor a "question"')


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that is trained on the prompts. It is always the same, and encodes any text."""
    text = [FEW_SHOT_INSTRUCTION, *_questions(256), *rerank_prompts(len(_SUBJECTS) * len(_PHRASINGS), 1)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD)


def tokenize(prompts: Sequence[str], by: PreTrainedTokenizerBase | None = None) -> dict[str, torch.Tensor]:
    """Return the prompts as `input_ids` and `attention_mask`, both int64 [B, S], padded on the right.

    `by` is the tokenizer, by default that of this module.
    """
    encoded = (by or tokenizer())(list(prompts), padding=True, padding_side="right", return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def qwen3(
    hidden: int = 512,
    layers: int = 6,
    *,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 64,
    intermediate: int = 1536,
    vocabulary: int | None = None,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """Return an unmodified Qwen3 of transformers with random weights, in eval mode.

    `vocabulary` is by default the size of the tokenizer of this module. The caller's random state is not changed.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer()) if vocabulary is None else vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device, done: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Return the seconds of each call in each round.

    Every round runs every call once, every other round in reverse order, so that changes in the machine's speed affect
    all calls alike. `done` is called after each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in reversed(calls) if index % 2 else calls:
            _synchronize(device)
            start = time.perf_counter()
            calls[name]()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
        done()
    return seconds


def warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Run the call once, on a GPU for a second: its clocks went down while the program compiled."""
    start = time.perf_counter()
    while True:
        call()
        _synchronize(device)
        if device.type == "cpu" or time.perf_counter() - start > 1:
            return


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
