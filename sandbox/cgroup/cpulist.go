// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// mostCPUs bounds a list: the kernel's own greatest number (NR_CPUS) is 8192.
const mostCPUs = 8192

// parseList reads the kernel's form of a set, "0-3,7", into a bit mask whose first
// byte holds 0 to 7.
func parseList(list string) ([]byte, error) {
	var mask []byte
	for part := range strings.SplitSeq(list, ",") {
		from, to, ranged := strings.Cut(strings.TrimSpace(part), "-")
		if !ranged {
			to = from
		}
		a, err1 := strconv.ParseUint(from, 10, 16)
		b, err2 := strconv.ParseUint(to, 10, 16)
		if err1 != nil || err2 != nil || a > b || b >= mostCPUs {
			return nil, fmt.Errorf("%q: must be a number or a range as in 0-3,7: %w", part, errdefs.ErrInvalidArgument)
		}
		for n := a; n <= b; n++ {
			for uint64(len(mask)) <= n/8 {
				mask = append(mask, 0)
			}
			mask[n/8] |= 1 << (n % 8)
		}
	}
	return mask, nil
}
