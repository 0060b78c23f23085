#!/usr/bin/env bash
# Install sdjax on this machine and, where systemd runs, start it as a service. Again is an upgrade: settings, jobs and
# compiled programs stay.
#
#   sudo install.sh
#
# From the environment:
#   PACKAGE     what pip installs: sdjax, a wheel, or a folder with the source
#   EXTRAS      server,tpu
#   PREFIX      /opt/sdjax: the virtual environment and the scripts beside this one
#   CONFIG_DIR  /etc/sdjax: sdjax.env, which is written once and then yours
#   PYTHON      an interpreter of 3.11 or later; without one of those on this machine, uv fetches one
#   SERVICE     yes; "no" leaves systemd and users alone, for which no root is needed
set -euo pipefail

package=${PACKAGE:-sdjax}
extras=${EXTRAS:-server,tpu}
prefix=${PREFIX:-/opt/sdjax}
config_dir=${CONFIG_DIR:-/etc/sdjax}
service=${SERVICE:-yes}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

is_recent() { "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
        if is_recent "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_environment() {
    local python
    if python=$(find_python); then
        "$python" -m venv "$prefix/venv"
        return
    fi
    # The images of TPU VMs have Python 3.10.
    python3 -m pip install --quiet --target "$prefix/uv" uv
    UV_PYTHON_INSTALL_DIR=$prefix/python PYTHONPATH=$prefix/uv \
        python3 -m uv venv --seed --python 3.12 "$prefix/venv"
}

if [[ $service == yes && $EUID -ne 0 ]]; then
    echo "install.sh: run it as root, or with SERVICE=no" >&2
    exit 2
fi
if [[ -n ${PYTHON:-} ]] && ! is_recent "$PYTHON"; then
    echo "install.sh: PYTHON=$PYTHON is not Python 3.11 or later with venv" >&2
    exit 2
fi

install -d "$prefix" "$config_dir"
[[ -x $prefix/venv/bin/python ]] || make_environment
"$prefix/venv/bin/python" -m pip install --quiet --upgrade "${package}[$extras]"
for script in healthcheck.sh drain.sh; do
    install -m 755 "$here/$script" "$prefix/$script"
done
# It holds the key: nobody else reads it. systemd does so as root, before it becomes the service's user.
[[ -f $config_dir/sdjax.env ]] || install -m 600 "$here/sdjax.env" "$config_dir/sdjax.env"
"$prefix/venv/bin/sdjax" version

if [[ $service == yes ]]; then
    id sdjax >/dev/null 2>&1 || useradd --system --no-create-home --shell /usr/sbin/nologin sdjax
    sed -e "s|/opt/sdjax|$prefix|g" -e "s|/etc/sdjax|$config_dir|g" "$here/sdjax.service" \
        >/etc/systemd/system/sdjax.service
    systemctl daemon-reload
    systemctl enable sdjax.service
    systemctl restart sdjax.service
fi
