"""The first program in a sandbox: it limits itself, reads the program of a step from its standard input and runs it.

Never imported: `sandbox` hands its text to an interpreter that has neither site packages nor this one. What it runs was
written by a model, so it runs nothing where it is not in the sandbox, whose folder no other place has.
"""

import json
import os
import re
import resource
import sys


def numbers(text):
    """The numbers in a text."""
    found = re.findall(r"(?<![\w.])-?(?>\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?(?!\w)", text)
    return [int(number) if number.lstrip("-").isdigit() else float(number) for number in found]


def limit(seconds, memory):
    """No way back: a hard limit cannot be raised again."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(what, (most, most))


def main():
    """Run the program; the value of an expression is printed, unless it is None: print(2) has printed 2 already."""
    if os.getcwd() != "/empty":
        raise SystemExit("programs of steps are run in the sandbox only.")
    task = json.load(sys.stdin)
    limit(task["seconds"], task["memory"])
    names = {"numbers": numbers, **task["results"]}
    try:
        expression = compile(task["program"], "<step>", "eval")
    except SyntaxError:
        exec(compile(task["program"], "<step>", "exec"), names)
        return
    value = eval(expression, names)
    if value is not None:
        print(int(value) if isinstance(value, float) and value.is_integer() else value)


if __name__ == "__main__":
    main()
