#!/usr/bin/env bash
# expect_exit_code.sh CODE COMMAND...: succeeds if the command ends with exactly this code.
expected=$1
shift
"$@"
code=$?
[[ $code == "$expected" ]] || { echo "exit code $code, expected $expected: $*" >&2; exit 1; }
