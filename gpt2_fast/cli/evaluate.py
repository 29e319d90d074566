"""`gpt2-fast eval`."""

from __future__ import annotations

import argparse

from gpt2_fast.cli.shared import IMPLEMENTATIONS, OFFLINE, check_published, choice, refuse_without

EVAL_FILES = {
    "text": "perplexity of a UTF-8 text by strided windows, as transformers documents it",
    "hellaswag": "accuracy on hellaswag_val.jsonl, by llm.c's convention and lm-evaluation-harness's",
    "lambada": "last-word accuracy and perplexity on OpenAI's lambada_test.jsonl",
    "shard": "loss of token data: nanoGPT or llm.c .bin, a folder or a quoted pattern of them",
}


def add(commands) -> None:
    parser = commands.add_parser(
        "eval", help="perplexity, HellaSwag, LAMBADA, loss of token data",
        description="Evaluates a model on local files; several kinds in one call.",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint folder, hub repository, nanoGPT ckpt.pt or llm.c .bin")
    for task, text in EVAL_FILES.items():
        add(f"--{task}", metavar="FILE", help=text)
    add("--context", type=int, metavar="N", help="tokens a window of --text and --shard (default n_positions)")
    add("--stride", type=int, metavar="N", help="tokens between the windows of --text (default half the context)")
    add("--batch-size", type=int, default=8, metavar="N", help="windows or texts at a time (default 8)")
    add("--limit", type=int, metavar="N", help="at most N windows or examples of each file")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--impl", default="auto", metavar=choice(IMPLEMENTATIONS), help="of every op which has it (default auto)")
    add("--json", metavar="FILE", help="write the results there too; -: print them as JSON and nothing else")
    parser.set_defaults(run=run, offline=OFFLINE)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from gpt2_fast.evaluate import tasks
    from gpt2_fast.report.machine import resolve_device

    files = {task: path for task in EVAL_FILES if (path := getattr(arguments, task)) is not None}
    if not files:
        raise ValueError(f"eval needs a file: {', '.join('--' + task for task in EVAL_FILES)}")
    if "text" not in files:
        refuse_without(arguments, ("stride",), "--text")
    if not {"text", "shard"} & files.keys():
        refuse_without(arguments, ("context",), "--text or --shard")
    tasks.check_options(files, arguments.batch_size, arguments.limit)
    check_published(arguments.model)
    device, dtype = resolve_device(arguments.device), getattr(torch, arguments.dtype)
    model = tasks.load_model(arguments.model, dtype=dtype, device=device, impl=arguments.impl)
    head = {"model": arguments.model, "dtype": arguments.dtype, "device": str(device)}
    results = []
    for result in tasks.evaluate_files(
        model, files, stride=arguments.stride, context=arguments.context, batch_size=arguments.batch_size,
        limit=arguments.limit,
    ):  # fmt: skip
        if arguments.json != "-":
            print(tasks.table([result]), flush=True)
        results.append(result)
    if arguments.json == "-":
        print(tasks.as_json({**head, "results": results}))
    elif arguments.json is not None:
        tasks.write_json(arguments.json, {**head, "results": results})
    return 0
