// SPDX-License-Identifier: Apache-2.0

package devices

import "context"

// WaitFor calls look, and again after every uevent, until it says that what it
// looks for is there, bounded by ctx and by Timeout.
func (f *Finder) WaitFor(ctx context.Context, what string, look func() (bool, error)) error {
	_, err := f.wait(ctx, what, func() (string, bool, error) {
		ok, err := look()
		return "", ok, err
	})
	return err
}
