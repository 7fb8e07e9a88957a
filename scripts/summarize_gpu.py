#!/usr/bin/env python3
"""The ragged experts of one scripts/gpu_check.sh run as Markdown: summarize_gpu.py OUT, with bench-mma.log, bench-wgmma.log and peers.log in it."""
import re
import sys


def rows(path, pattern):
    with open(path, encoding="utf-8") as file:
        return {(m["pass"], int(m["tokens"]), m["ranks"]): m for m in (re.match(pattern, line) for line in file) if m}


def main(out):
    shape = r"(?P<pass>fwd\S*)\s+O1 \S+ T=(?P<tokens>\d+)\s.*k=2 (?P<ranks>\S+)"
    ours = shape + r"\s+bf16 \|\s+(?P<ms>\S+) ms .* floor (?P<floor>\S+) (?P<bound>\S) "
    mma, wgmma = (rows(f"{out}/bench-{family}.log", ours) for family in ("mma", "wgmma"))
    peers = rows(f"{out}/peers.log", shape + r"\s+\| loop\s+(?P<loop>\S+) ms \| grouped\s+(?P<grouped>\S+) ms")
    print("| pass | tokens | ranks | ours mma, ms | ours wgmma, ms | floor, ms | share of the floor, better of the two | loop, ms | grouped, ms | loop / ours | grouped / ours |")
    print("|---" * 11 + "|")
    for key, m in sorted(mma.items(), key=lambda item: (item[0][1], ("mix8", "small8", "uniform16").index(item[0][2]), len(item[0][0]))):
        a, b, floor = float(m["ms"]), float(wgmma[key]["ms"]), float(m["floor"])
        loop, grouped, best = float(peers[key]["loop"]), float(peers[key]["grouped"]), min(a, b)
        print(f"| {key[0]} | {key[1]} | {key[2]} | {a:.3f} | {b:.3f} | {floor:.4f} ({'bytes' if m['bound'] == 'M' else 'products'}) | {100 * floor / best:.0f} % |"
              f" {loop:.3f} | {grouped:.3f} | {loop / best:.2f} | {grouped / best:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
