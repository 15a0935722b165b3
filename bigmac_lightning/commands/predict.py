"""The command `bigmac predict RUN --output FILE`: what a trained model replies to each example of a split."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torchmetrics.text import CHRFScore

from bigmac_lightning.commands.answer import answer, parser_of
from bigmac_lightning.example_sources import name_of, sources_of

SPLITS = ("train", "val", "test", "predict")


def predict(
    run: str,
    output: str = "replies.jsonl",
    split: str = "predict",
    limit: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str | None = None,
) -> dict[str, float]:
    """Write a JSON line for each example: its name; "reply", what the model says, and "reference", what the example has
    there, as the template writes it, if it ends with a reply; or "image", the picture that a generator has drawn, in a
    folder beside the file. Of an example that cannot be used, "error" says why.

    Args:
        run: Folder of a run, or a checkpoint of it.
        output: File to write.
        split: The examples of train, val, test or predict.
        limit: Number of examples of each source, from the first on; by default all.
        max_new_tokens: Tokens after which a reply is cut off; by default 256, or what the data say.
        temperature: What logits are divided by before a token is drawn; 0 takes the most likely token.
        top_p: Draw among the most likely tokens that together have this probability.
        seed: Of the draws, and of the noise of pictures.
        device: Such as cuda:0; by default a GPU, if there is one.

    Returns: the number of "replies", "images" and "errors"; and where there are references "exact_match", the share of
        replies that are the reference, and "chrF", their likeness in letters (torchmetrics' CHRFScore).

    Raises:
        ValueError, FileNotFoundError: there is no such run; its DataModule has no examples, or none of this split.
    """
    from bigmac_lightning.loaded_run import load

    if split not in SPLITS:
        raise ValueError(f"--split is {split!r}; expected one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; expected at least 1")
    place = Path(output)
    if not place.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {place.parent} for {output}")
    loaded = load(run, device=device)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    loaded.sampling(**sampling)  # wrong ones are refused before the file is written
    sources = _sources(loaded.data, split)
    examples = ((source, index) for source in sources for index in range(len(source))[:limit])
    total = sum(len(range(len(source))[:limit]) for source in sources)
    found = {"replies": 0.0, "images": 0.0, "errors": 0.0}
    pairs, alike = list[bool](), CHRFScore()
    with place.open("w", encoding="utf-8") as file, torch.inference_mode():
        shown = track(examples, "replies", total, console=Console(stderr=True))
        for number, (source, index) in enumerate(shown):
            line: dict[str, Any] = {"name": name_of(source, index)}
            try:
                example = source[index]
                prompt, reference = loaded.data.question(example)
            except Exception as error:  # a source may raise anything
                line["error"] = str(error) or type(error).__name__
                found["errors"] += 1
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                continue
            if example.target is not None:
                pictures = place.with_suffix("")
                pictures.mkdir(exist_ok=True)
                [picture] = loaded.pictures(prompt, seed + number)
                line["image"] = str(pictures / f"{number:06}.png")
                picture.save(line["image"])
                found["images"] += 1
            else:
                line["reply"] = "".join(loaded.pieces(prompt, **sampling))
                found["replies"] += 1
            if reference is not None:
                line["reference"] = reference
                pairs.append(line["reply"] == reference)
                alike.update([line["reply"]], [[reference]])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if pairs:
        likeness: Any = alike.compute()
        found |= {"exact_match": sum(pairs) / len(pairs), "chrF": float(likeness)}
    return found


def _sources(data: Any, split: str) -> list[Any]:
    """The sources of a split."""
    if sources := sources_of(data, split):
        return sources
    raise ValueError(f"there is no source of examples of the split {split!r}: choose another --split")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = parser_of("predict", "Write what a trained model replies to examples.", predict, positional=True)

    def run() -> None:
        options = vars(parser.parse_args(list(argv)))
        found = predict(**options)
        text = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if value or name == "exact_match")
        Console().print(f"{options['output']}: {text}", highlight=False, soft_wrap=True)

    return answer("predict", run)
