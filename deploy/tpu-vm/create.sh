#!/usr/bin/env bash
# Ask for a TPU VM, wait until it is there, and install and start sdjax on it. Runs where gcloud does.
#
#   create.sh NAME ZONE [WHEEL]
#
# NAME      of the VM and of its queued resource
# WHEEL     a local wheel of sdjax to install (`python -m build --wheel`); without one the release on PyPI is
#
# From the environment:
#   ACCELERATOR   v5litepod-8: one host with 8 chips. Several hosts are not supported yet.
#   RUNTIME       v2-alpha-tpuv5-lite, the software version for that accelerator
#   ENV_FILE      a file of settings for the server, see sdjax.env
#   CREATE_FLAGS  more flags for gcloud, such as "--spot" or "--internal-ips --network=..."
set -euo pipefail

if (($# < 2 || $# > 3)); then
    sed -n '2,/^set -/{/^set -/!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
name=$1 zone=$2 wheel=${3:-}
accelerator=${ACCELERATOR:-v5litepod-8}
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
env_file=${ENV_FILE:-}
read -ra create_flags <<<"${CREATE_FLAGS:-}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

[[ -z $wheel || -f $wheel ]] || { echo "create.sh: there is no wheel $wheel" >&2; exit 2; }
[[ -z $env_file || -f $env_file ]] || { echo "create.sh: there is no file $env_file" >&2; exit 2; }

tpu() { gcloud compute tpus "$@" --zone="$zone"; }

tpu queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" "${create_flags[@]}"

echo "waiting for $name; a queued resource may take from minutes to days, and this script may be stopped meanwhile"
while true; do
    state=$(tpu queued-resources describe "$name" --format='value(state.state)')
    case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDED) echo "create.sh: $name is $state" >&2; exit 1 ;;
        *) sleep 20 ;;
    esac
done

package=sdjax
tpu tpu-vm ssh "$name" --command='mkdir -p sdjax-deploy'
tpu tpu-vm scp "$here"/* "$name:sdjax-deploy/"
if [[ -n $wheel ]]; then
    package=sdjax-deploy/$(basename "$wheel")
    tpu tpu-vm scp "$wheel" "$name:$package"
fi
if [[ -n $env_file ]]; then
    tpu tpu-vm scp "$env_file" "$name:sdjax-deploy/sdjax.env"
fi
tpu tpu-vm ssh "$name" --command="chmod 600 sdjax-deploy/sdjax.env; sudo PACKAGE='$package' bash sdjax-deploy/install.sh"
tpu tpu-vm ssh "$name" --command='bash sdjax-deploy/healthcheck.sh --wait 1800'

cat <<EOF
$name is ready. From here:
  gcloud compute tpus tpu-vm ssh $name --zone=$zone -- -L 8600:localhost:8600
  curl http://localhost:8600/ready
EOF
