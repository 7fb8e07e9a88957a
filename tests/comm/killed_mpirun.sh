#!/usr/bin/env bash
# killed_mpirun.sh MPIRUN PROGRAM: kills mpirun with SIGKILL and expects its three processes to vanish.
set -euo pipefail
ready=$(mktemp)
"$1" -n 3 --oversubscribe --allow-run-as-root --bind-to none "$2" hang >"$ready" &
mpirun=$!
until [[ $(wc -l <"$ready") == 3 ]]; do kill -0 $mpirun; sleep 0.05; done
rm "$ready"
mapfile -t processes < <(pgrep -P $mpirun)
[[ ${#processes[@]} == 3 ]]
kill -KILL $mpirun
for ((i = 0; i < 200; ++i)); do
  alive=0
  for pid in "${processes[@]}"; do kill -0 "$pid" 2>/dev/null && alive=$((alive + 1)); done
  [[ $alive == 0 ]] && exit 0
  sleep 0.05
done
echo "$alive processes outlived mpirun by 10 s" >&2
kill -KILL "${processes[@]}"
exit 1
