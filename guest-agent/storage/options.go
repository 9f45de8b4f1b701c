// SPDX-License-Identifier: Apache-2.0

package storage

import (
	"strings"

	"golang.org/x/sys/unix"
)

// Options is a list of mount(8) words as mount(2) wants them.
type Options struct {
	Flags       uintptr // without propagation
	Propagation uintptr // MS_PRIVATE and the like, for a mount(2) of its own
	Data        string  // what the file system itself reads
}

// flagWords maps words to the flags they set, and for the negative ones clear.
var flagWords = map[string]struct {
	clear bool
	flag  uintptr
}{
	"defaults": {}, "rw": {true, unix.MS_RDONLY}, "ro": {false, unix.MS_RDONLY},
	"suid": {true, unix.MS_NOSUID}, "nosuid": {false, unix.MS_NOSUID},
	"dev": {true, unix.MS_NODEV}, "nodev": {false, unix.MS_NODEV},
	"exec": {true, unix.MS_NOEXEC}, "noexec": {false, unix.MS_NOEXEC},
	"async": {true, unix.MS_SYNCHRONOUS}, "sync": {false, unix.MS_SYNCHRONOUS},
	"dirsync": {false, unix.MS_DIRSYNC}, "remount": {false, unix.MS_REMOUNT},
	"bind": {false, unix.MS_BIND}, "rbind": {false, unix.MS_BIND | unix.MS_REC},
	"atime": {true, unix.MS_NOATIME}, "noatime": {false, unix.MS_NOATIME},
	"diratime": {true, unix.MS_NODIRATIME}, "nodiratime": {false, unix.MS_NODIRATIME},
	"relatime": {false, unix.MS_RELATIME}, "norelatime": {true, unix.MS_RELATIME},
	"strictatime": {false, unix.MS_STRICTATIME}, "nostrictatime": {true, unix.MS_STRICTATIME},
}

var propagationWords = map[string]uintptr{
	"private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE | unix.MS_REC,
	"slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE | unix.MS_REC,
	"shared": unix.MS_SHARED, "rshared": unix.MS_SHARED | unix.MS_REC,
	"unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

// ParseOptions sorts words into flags, propagation and data. The last word wins.
func ParseOptions(words []string) Options {
	var o Options
	var data []string
	for _, list := range words {
		for _, w := range strings.Split(list, ",") {
			if w == "" {
				continue
			}
			if f, ok := flagWords[w]; ok {
				if f.clear {
					o.Flags &^= f.flag
				} else {
					o.Flags |= f.flag
				}
			} else if p, ok := propagationWords[w]; ok {
				o.Propagation = p
			} else {
				data = append(data, w)
			}
		}
	}
	o.Data = strings.Join(data, ",")
	return o
}
