#!/bin/sh
# Print the path of Python VERSION, from PATH or from pyenv.
# usage: find_python.sh 3.12
set -eu
version=$1
if command -v "python$version" >/dev/null 2>&1 && "python$version" -c '' 2>/dev/null; then
    command -v "python$version"
    exit
fi
for python in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
    if [ -x "$python" ]; then
        echo "$python"
        exit
    fi
done
echo "find_python.sh: no Python $version on PATH or under pyenv: install it, for example with pyenv" >&2
exit 1
