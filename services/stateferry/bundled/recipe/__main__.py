"""Command line of the recipe: corpus, tokenizer, train, export, evaluate."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from stateferry.bundled.recipe import corpus, evaluate, export, notices, tokenizer
from stateferry.bundled.recipe.config import BUNDLED
from stateferry.bundled.recipe.train import TrainSettings, train

# Not bundled_model_dir(): the recipe must also run where the model is yet to be made.
MODELS_DIR = Path(__file__).parents[1]


def _parser() -> argparse.ArgumentParser:
    program = "python -m stateferry.bundled.recipe"
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "corpus": "download, clean and split the text",
        "tokenizer": "learn the vocabulary and encode the text",
        "train": "train a model",
        "export": "write the trained model as a Hugging Face directory",
        "evaluate": "measure a model directory on held-out text",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--work", type=Path, default=Path(".corpus"), help="work directory")
        if name != "corpus":
            command.add_argument(
                "--model", choices=sorted(BUNDLED), default="hybrid_english", help="which model"
            )
            command.add_argument("--model-dir", type=Path, help="default: the bundled one")
        if name in ("train", "export"):
            command.add_argument("--checkpoint", type=Path, help="default: WORK/MODEL")
        if name == "train":
            _train_arguments(command)
        if name == "evaluate":
            command.add_argument("--device", default="cpu")
            command.add_argument("--no-ngram", action="store_true", help="skip the 5-gram")
    return parser


def _train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-seconds", type=float, default=510, help="bound of this run")
    command.add_argument("--schedule-seconds", type=float, help="end of the learning-rate schedule")
    command.add_argument("--resume", type=Path, help="checkpoint directory to go on from")
    command.add_argument("--batch", type=int, default=96, help="windows per step")
    command.add_argument("--length", type=int, default=1024, help="tokens per window")
    command.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    command.add_argument("--dropout", type=float, default=0.15, help="on every layer's output")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--evaluate-every", type=float, default=60.0, help="seconds")
    command.add_argument("--no-compile", action="store_true")


def _train(args: argparse.Namespace, target: Path) -> None:
    settings = TrainSettings(
        work=args.work,
        output=target,
        max_seconds=args.max_seconds,
        schedule_seconds=args.schedule_seconds or args.max_seconds,
        batch=args.batch,
        length=args.length,
        peak_rate=args.rate,
        seed=args.seed,
        evaluate_every_seconds=args.evaluate_every,
        compiled=not args.no_compile,
        resume=args.resume,
    )
    train(settings, dataclasses.replace(BUNDLED[args.model], dropout=args.dropout))


def main() -> None:
    """Run one subcommand."""
    args = _parser().parse_args()
    if args.command == "corpus":
        corpus.build(args.work)
        return
    model_dir = args.model_dir or MODELS_DIR / args.model
    if args.command == "tokenizer":
        tokenizer.train(args.work, model_dir)
        tokenizer.write_arrays(args.work, model_dir)
    elif args.command == "train":
        _train(args, args.checkpoint or args.work / args.model)
    elif args.command == "export":
        export.export_checkpoint(args.checkpoint or args.work / args.model, model_dir)
        notices.write_sources(args.work, model_dir)
    else:
        evaluate.evaluate(args.work, model_dir, args.device, ngram_too=not args.no_ngram)


if __name__ == "__main__":
    main()
