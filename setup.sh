# Makes and enters .venv; sourced by demo.sh and test.sh, which may name a further list of packages in $extra.
if [ ! -d .venv ]; then
    for python in python3 python; do
        command -v "$python" >/dev/null 2>&1 && break
    done
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: Python 3.10 or newer is needed" >&2
        exit 2
    }
    "$python" -m venv .venv || {
        rm -rf .venv
        echo "error: $python cannot make a virtual environment; install its venv package" >&2
        exit 2
    }
fi
. .venv/bin/activate
for list in requirements.txt ${extra:-}; do
    if ! cmp -s "$list" ".venv/installed-$list"; then
        python -m pip install --disable-pip-version-check -q -r "$list" -c constraints.txt
        cp "$list" ".venv/installed-$list"
    fi
done
