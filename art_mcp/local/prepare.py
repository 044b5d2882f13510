"""Models that cannot learn to write tool calls, because the embedding of a tag was never trained: found, and mended in a copy.

Rows that no text ever used all end in the same place (they get the same gradient through the softmax, and the same decay), so
an untrained tag is one whose row has the direction of an unused token's. No LoRA on the linear layers can prefer such a tag.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from art_mcp.core.bridging import ANSWER, PROBE, QUESTION
from art_mcp.core.template import ChatTemplate
from art_mcp.errors import ModelError, TemplateError, boundary
from art_mcp.local.checkpoints import OPTIMIZER_FILE, STATE_FILE, written_aside
from art_mcp.local.models import adapter_base, base_of, check_source, hash_weights, load_tokenizer, make_template, model_source
from art_mcp.local.rows import Matrix, token_matrices
from art_mcp.sampling.tokenizer import BackendTokenizer
from art_mcp.store.versions import installed
from art_mcp.types import Message

RECORD = "art_mcp_prepared.json"
"""In a mended copy: what was changed."""
PARALLEL = 0.999
"""The cosine from which two rows count as the same; of trained tokens' rows, hardly any two come near."""
COMPARED, SAMPLED = 512, 2000
"""At most so many unused tokens are compared with, and so many ordinary ones tell what is usual."""
METHOD = "the mean of the embeddings of its spelling's pieces, scaled to the median norm of the ordinary tokens' rows"
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00000", "function": {"name": PROBE.name, "arguments": {"word": "heron"}}}],
}
RESULT: Message = {"role": "tool", "name": PROBE.name, "tool_call_id": "call00000", "content": "A wading bird."}


@dataclass(frozen=True, slots=True)
class Untrained:
    """A tag of the template that is one token, number `id`, whose embedding is that of `like`, which nothing was trained on."""

    tag: str
    id: int
    like: str
    cosine: float


def untrained_tags(source: str) -> list[Untrained]:
    """The tags that conversations with tool calls are made of, and that the model of `source` never learned.

    Of an adapter, its base is looked at. Empty also where it cannot be told: no embedding in safetensors files, no usable
    template, rows that are all alike.
    """
    folder = weights_folder(source)
    return find_untrained(folder, load_tokenizer(str(folder)))


def find_untrained(folder: Path, tokenizer: Any) -> list[Untrained]:
    found: dict[int, Untrained] = {}
    tags = template_tags(tokenizer)
    for matrix in token_matrices(folder):
        for one in compare(matrix, tokenizer, tags):
            found.setdefault(one.id, one)
    return sorted(found.values(), key=lambda one: one.id)


def weights_folder(source: str) -> Path:
    """Where the base weights of `source` lie: a folder, an adapter's base, or what is here of a model of the hub."""
    base = adapter_base(source)
    return weights_folder(base) if base else local_folder(model_source(source))


def local_folder(place: str) -> Path:
    check_source(place)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    with boundary(ModelError, f"fetching {place}", OSError, ValueError):
        return Path(snapshot_download(place, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]))


def template_tags(tokenizer: Any) -> dict[int, str]:
    """The added tokens, spelling by number, of which the model's template makes a conversation with a tool call."""
    backend = BackendTokenizer(tokenizer)
    try:
        text = converse(make_template(tokenizer, backend.specials))
    except TemplateError:  # a template that takes no tool calls is refused, in its own words, when the model is loaded
        return {}
    added = {int(number): str(token.content) for number, token in tokenizer.added_tokens_decoder.items()}
    return {number: added[number] for number in sorted(set(backend.encode(text)) & added.keys())}


def converse(template: ChatTemplate) -> str:
    return template.render([QUESTION, CALL, RESULT, ANSWER], tools=[PROBE], add_generation_prompt=True)


def compare(matrix: Matrix, tokenizer: Any, tags: dict[int, str]) -> list[Untrained]:
    """Those of `tags` whose row in this matrix is parallel to an unused token's, to another tag's, or is nothing at all."""
    added = {int(number): str(token.content) for number, token in tokenizer.added_tokens_decoder.items()}
    spare = {number: added.get(number, f"row {number}") for number in [*added, *range(len(tokenizer), matrix.rows)]}
    unused = {number: spelling for number, spelling in spare.items() if number < matrix.rows and number not in tags}
    names = dict(list(unused.items())[:COMPARED]) | tags
    rows = normalize(matrix.read(list(names)))
    ordinary = normalize(matrix.read(ordinary_tokens(tokenizer, matrix)))
    others = rows[: len(names) - len(tags)]
    if len(others) and float((ordinary @ others.T).amax(dim=1).median()) > PARALLEL:
        return []  # everything is parallel to everything: then it tells nothing
    found: list[Untrained] = []
    for number, tag in tags.items():
        like, cosine = nearest(rows, list(names).index(number))
        if cosine > PARALLEL:
            found.append(Untrained(tag, number, list(names.values())[like], round(cosine, 6)))
        elif not rows[list(names).index(number)].any():
            found.append(Untrained(tag, number, "nothing: its row is all zeros", 0.0))
    return found


def nearest(rows: Tensor, place: int) -> tuple[int, float]:
    cosines = rows @ rows[place]
    cosines[place] = -1.0
    best = int(cosines.argmax())
    return best, float(cosines[best])


def ordinary_tokens(tokenizer: Any, matrix: Matrix) -> list[int]:
    """Some tokens of the vocabulary, evenly spread, none of them added to it."""
    added = {int(number) for number in tokenizer.added_tokens_decoder}
    usual = [number for number in range(min(len(tokenizer), matrix.rows)) if number not in added]
    return usual[:: max(1, len(usual) // SAMPLED)]


def prepare(source: str, out: Path) -> dict[str, Any]:
    """Writes to `out` a copy of the model of `source` in which every untrained tag's row, in the input and the output
    embedding, is `METHOD`; all other bytes of its weights stay. Returns the record that stands in the copy too.

    Raises ModelError where nothing needs mending, for an adapter, and where `out` is there already.
    """
    place = model_source(source)
    base = adapter_base(source)
    if base is not None:
        raise ModelError(f"{source} is an adapter: prepare its base {base}, and train anew on that")
    if out.exists():
        raise ModelError(f"{out} exists already: choose another place for the copy")
    folder = local_folder(place)
    tokenizer = load_tokenizer(str(folder))
    tags = find_untrained(folder, tokenizer)
    if not token_matrices(folder):
        raise ModelError(f"{source} cannot be prepared: no embedding matrix was found in its safetensors files")
    if not tags:
        raise ModelError(f"{source} needs no preparation: none of the tags that its template writes is untrained")
    pieces = {one.id: spell(tokenizer, one) for one in tags}
    record = {
        "made_by": f"art-mcp {installed('art-mcp') or '(not installed)'}",
        "source": str(source),
        "source_sha256": hash_weights(str(folder)),
        "method": METHOD,
        "tags": [{**asdict(one), "pieces": pieces[one.id]} for one in tags],
    }
    with written_aside(out) as aside:
        copy_model(folder, aside)
        matrices = token_matrices(aside)
        for matrix in matrices:
            mend(matrix, pieces, usual=ordinary_tokens(tokenizer, matrix))
        record |= {"matrices": [matrix.name for matrix in matrices], "weights_sha256": hash_weights(str(aside))}
        (aside / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def spell(tokenizer: Any, tag: Untrained) -> list[int]:
    """The tokens of a tag's spelling, as if the tag were none."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    plain = Tokenizer.from_str(json.dumps({**settings, "added_tokens": []}))
    pieces = [int(piece) for piece in plain.encode(tag.tag, add_special_tokens=False).ids]
    if not pieces or tag.id in pieces:
        raise ModelError(f"the spelling of {tag.tag} has no pieces in this tokenizer that its row could be made of")
    return pieces


def copy_model(folder: Path, out: Path) -> None:
    """The files of a model folder; without weights in other formats, which would not be mended, and without an optimizer."""
    for file in sorted(folder.iterdir()):
        other = file.suffix in (".bin", ".pth", ".gguf", ".h5", ".msgpack") or file.name in (OPTIMIZER_FILE, STATE_FILE)
        if file.is_file() and not other:
            shutil.copyfile(file, out / file.name)


def mend(matrix: Matrix, pieces: dict[int, list[int]], *, usual: Sequence[int]) -> None:
    norm = float(torch.linalg.vector_norm(matrix.read(usual), dim=1).median())
    rows = {number: normalize(matrix.read(parts).mean(dim=0), dim=0) * norm for number, parts in pieces.items()}
    for number, row in rows.items():
        matrix.write(number, row)


def read_record(source: str) -> dict[str, Any] | None:
    """What was changed in the model of `source`, or in the base of an adapter, to prepare it; None where nothing was."""
    path = Path(base_of(source)) / RECORD
    if not path.is_file():
        return None
    with boundary(ModelError, f"reading {path}", OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
