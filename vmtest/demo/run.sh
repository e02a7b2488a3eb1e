#!/usr/bin/env bash
# `make demo`: two blank VMs become an IM cluster. `run.sh down` takes it away.
set -euo pipefail
cd "$(dirname "$0")/../.."
platter=$PWD/bin/platter
lab=$PWD/build/lab/demo
work=$PWD/build/demo
socket=/run/platter/platter.sock # the default, so that plain `platter node ls` works

down() {
	[ ! -e "$lab" ] || "$platter" lab down --state "$lab" --purge
	rm -rf "$work"
}

if [ "${1:-up}" = down ]; then
	down
	exit
fi

down # always from blank machines
mkdir -p "$work"
ssh-keygen -q -t ed25519 -N '' -C platter-demo -f "$work/ssh_key"

echo "== the lab: two blank machines, powered off"
"$platter" lab up --state "$lab" vmtest/demo/lab.yaml

echo "== the disc host"
# It lives in the lab's network; only its page is reached from here.
setsid "$platter" lab exec --state "$lab" --listen 127.0.0.1:0 -- \
	"$platter" serve -c vmtest/demo/rack.yaml --store build/store --state "$work/state" \
	>"$work/serve.log" 2>&1 </dev/null &
serve=$!
until [ -S "$socket" ]; do
	kill -0 $serve 2>/dev/null || { cat "$work/serve.log" >&2; exit 1; }
	sleep 0.2
done
page=$(grep -oE 'http://127\.0\.0\.1:[0-9]+' "$work/serve.log" | head -1)
echo "page: $page/"

echo "== power on"
since=$(date -u +%Y-%m-%dT%H:%M:%SZ)
"$platter" lab power on node1 node2 --state "$lab"
if ! "$platter" watch --until ready --since "$since"; then
	echo "== what the disc host said last" >&2
	tail -30 "$work/serve.log" >&2
	echo "Consoles: $lab/console/. The lab still runs: look around, then 'make demo-down'." >&2
	exit 1
fi

"$platter" node log node2 | grep probe | tail -1
cat <<EOF

Look around:
  page            $page/
  one node        bin/platter node show node1
  its journal     bin/platter node log node1
  its console     bin/platter lab console node1 --state $lab
  a shell on it   bin/platter lab exec --state $lab -- ssh -i $work/ssh_key -o UserKnownHostsFile=/dev/null root@10.77.0.11
  pull its plug   bin/platter lab power off node1 --state $lab
  install anew    bin/platter node reinstall node1 && bin/platter lab power cycle node1 --state $lab
  take it away    make demo-down
EOF
