#!/bin/busybox sh
# The first process of a machine that lives for one command: the host's files below, what is written above them in memory.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev 2> /dev/null
for module in /modules/*; do $b insmod "$module" || echo "no $module"; done
$b mount -t virtiofs -o ro root /host
$b mount -t tmpfs upper /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/host,upperdir=/upper/files,workdir=/upper/work root /new
for each in proc sysfs devtmpfs; do
    case $each in sysfs) to=sys ;; devtmpfs) to=dev ;; *) to=proc ;; esac
    $b mount -t $each $each /new/$to
done
$b mount -t tmpfs tmp /new/tmp
$b mount -t tmpfs run /new/run
$b mount -t bpf bpf /new/sys/fs/bpf
$b mount -t cgroup2 cgroup /new/sys/fs/cgroup
echo +memory > /new/sys/fs/cgroup/cgroup.subtree_control
$b ip link set lo up 2> /dev/null
# the command is in the kernel's command line behind "--command=", with + for blanks; what it prints goes to the second port
command=$($b sed 's/.*--command=\([^ ]*\).*/\1/; s/+/ /g' /proc/cmdline)
$b chroot /new /bin/sh -c "$command" > /dev/ttyS1 2> /dev/ttyS0
echo "ended with $?" > /dev/ttyS1
$b sync
$b reboot -f
