# shellcheck shell=bash
# Sourced by the other scripts: times named stages and prints where the time went.
#   stage NAME COMMAND...   runs the command and remembers its wall time; under set -e a failure ends the script with its code
#   stage_times             "set-up 0.4 s, build 31.0 s; 31.4 s in all"

declare -a stage_names=() stage_tenths=()

# The decimal sign of EPOCHREALTIME follows the locale: keep the digits only.
now_us() { echo "${EPOCHREALTIME//[^0-9]/}"; }

in_seconds() { echo "$(($1 / 10)).$(($1 % 10)) s"; }

stage() {
  local name=$1 start code
  shift
  start=$(now_us)
  "$@"   # no `|| ...` here: it would switch off set -e inside the command
  code=$?
  stage_names+=("$name")
  stage_tenths+=($((($(now_us) - start + 50000) / 100000)))
  return $code
}

stage_times() {
  local i line='' total=0
  for i in "${!stage_names[@]}"; do
    line+="${line:+, }${stage_names[i]} $(in_seconds "${stage_tenths[i]}")"
    total=$((total + stage_tenths[i]))
  done
  echo "$line; $(in_seconds "$total") in all"
}
