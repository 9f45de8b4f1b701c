// SPDX-License-Identifier: Apache-2.0

package vsocket

import (
	"context"
	"net"
	"sync"
)

// Serve runs handle for every connection of l, each in a goroutine of its own,
// until ctx is done, and returns when all of them have ended. It closes l; handle
// owns its connection. It is for any listener, a test's included.
func Serve(ctx context.Context, l net.Listener, handle func(net.Conn)) {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() { handle(c) })
	}
}
