#!/bin/sh
# Build the wheel, install it into an empty environment, and run the embedded default from another folder:
# the model and the task have to be inside the wheel, and nothing may be read from the source tree.
set -e
python=$1
flags=$2
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A clean copy of the tracked files: a stale build folder in the tree would end up in the wheel.
(cd "$root" && git ls-files -z | xargs -0 tar cf - ) | (mkdir "$work/source" && cd "$work/source" && tar xf -)
"$python" -m venv "$work/venv"
pip="$work/venv/bin/python -m pip --disable-pip-version-check --quiet"
# shellcheck disable=SC2086
$pip wheel --no-deps $flags -w "$root/dist" "$work/source"
wheel=$(ls -t "$root"/dist/hybridtheory-*.whl | head -1)
# shellcheck disable=SC2086
$pip install --prefer-binary -c "$root/constraints.txt" $flags "$wheel"
mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$work/venv/bin/probe-smoothness" --out "$work/run"
test -s "$work/run/report.json" && test -s "$work/run/report.md" && test -s "$work/run/trainer.toml"
echo "$(basename "$wheel"): installed in an empty environment, ran the embedded default from another folder"
