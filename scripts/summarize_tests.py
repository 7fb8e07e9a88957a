#!/usr/bin/env python3
"""Prints what ctest skipped and why, then one closing line: summarize_tests.py build/junit.xml"""
import collections
import re
import sys
import xml.etree.ElementTree as ElementTree


def reason(case):
    """GoogleTest prints 'file:line: Skipped' and the reason on the lines after it; other tests print 'skipped: reason'."""
    output = case.findtext("system-out") or ""
    found = re.search(r": Skipped\n(.+?)\n*(?=\[  SKIPPED \]|\Z)", output, re.DOTALL) or re.search(r"^skipped: (.+)$", output, re.MULTILINE)
    return " ".join(found.group(1).split()) if found else case.find("skipped").get("message") or "no reason given"


def main():
    passed = failed = 0
    skipped = collections.defaultdict(list)
    for case in ElementTree.parse(sys.argv[1]).getroot().iter("testcase"):
        if case.find("skipped") is not None:
            skipped[reason(case)].append(case.get("name"))
        elif case.find("failure") is not None or case.get("status") != "run":
            failed += 1
        else:
            passed += 1
    for why, names in sorted(skipped.items()):
        print(f"skipped, {why}: {', '.join(names)}")
    print(f"{passed} passed, {failed} failed, {sum(map(len, skipped.values()))} skipped")


if __name__ == "__main__":
    main()
