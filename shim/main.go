// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/kata-v2/kata/internal/version"
)

// Main is the whole program. It returns the exit status. Nothing but the answer
// goes to stdout and, on success, nothing to stderr: containerd reads both as one.
func Main(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if err := run(args, stdin, stdout); err != nil {
		fmt.Fprintf(stderr, "%s: %s\n", Name, err)
		return 1
	}
	return 0
}

func run(args []string, stdin io.Reader, stdout io.Writer) error {
	f, err := parseFlags(args)
	if err != nil {
		return err
	}
	switch {
	case f.version:
		_, err := fmt.Fprintln(stdout, "containerd-shim-kata-v2", version.Get())
		return err
	case f.info:
		return info(stdin, stdout)
	}
	ctx := context.Background()
	switch f.action {
	case "start", "delete":
		p, err := readParams(f, stdin)
		if err != nil {
			return err
		}
		if f.action == "start" {
			return start(ctx, p, stdout)
		}
		return remove(ctx, p, stdout)
	case "":
		switch {
		case os.Getenv(envDaemon) != "":
			return runDaemon(ctx)
		case os.Getenv(envMaker) != "":
			return runMaker(ctx, stdin)
		}
	}
	return fmt.Errorf("action %q: must be start or delete; this program is started by containerd", f.action)
}
