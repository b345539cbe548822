#!/bin/bash
# node.sh NAME DIRECTORY ADDRESS: a node, in namespaces of its own. Its first process: bash waits for orphans too.
set -e
read -r pid _ < /proc/self/stat # as the host numbers it
mount -t proc proc /proc
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
mount --bind "$2/hosts.$1" /etc/hosts
hostname "$1"
ip link set lo up
echo "$pid" > "$2/$1.pid.partial"
mv "$2/$1.pid.partial" "$2/$1.pid"
until ip link set eth0 up 2> /dev/null; do sleep 0.05; done # the keeper plugs it in
ip address add "$3/24" dev eth0
slurmd -D -N "$1" &
wait $!
