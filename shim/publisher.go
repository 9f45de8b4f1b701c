// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"time"

	events "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Event topics (containerd core/runtime/events.go).
const (
	topicCreate       = "/tasks/create"
	topicStart        = "/tasks/start"
	topicExit         = "/tasks/exit"
	topicOOM          = "/tasks/oom"
	topicDelete       = "/tasks/delete"
	topicExecAdded    = "/tasks/exec-added"
	topicExecStarted  = "/tasks/exec-started"
	topicPaused       = "/tasks/paused"
	topicCheckpointed = "/tasks/checkpointed"
	topicResumed      = "/tasks/resumed"
)

// queueLength bounds the events kept while containerd is down; a pod whose
// containers were told to restart thousands of times meanwhile loses the oldest.
const queueLength = 4096

// Waits between attempts to reach containerd.
const (
	publishFirst = 50 * time.Millisecond
	publishMax   = 5 * time.Second
	forwardLimit = 5 * time.Second
)

// publisher delivers events to containerd in the order they happened, later
// when it is down.
type publisher struct {
	namespace, address string
	log                *slog.Logger
	queue              chan *types.Envelope
	closing            chan struct{}
	done               chan struct{}
}

func newPublisher(namespace, address string, log *slog.Logger) *publisher {
	p := &publisher{
		namespace: namespace, address: strings.TrimPrefix(address, "unix://"), log: log,
		queue: make(chan *types.Envelope, queueLength), closing: make(chan struct{}), done: make(chan struct{}),
	}
	go p.run()
	return p
}

// publish queues an event; it does not wait for containerd.
func (p *publisher) publish(topic string, event proto.Message) {
	a, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		p.log.Error("event", "topic", topic, "error", err)
		return
	}
	e := &types.Envelope{Timestamp: timestamppb.Now(), Namespace: p.namespace, Topic: topic, Event: &anypb.Any{TypeUrl: a.TypeUrl, Value: a.Value}}
	for {
		select {
		case p.queue <- e:
			return
		default:
		}
		select {
		case old := <-p.queue:
			p.log.Error("event lost: containerd has been down for too many", "topic", old.Topic)
		default:
		}
	}
}

// close delivers what is queued, bounded by ctx.
func (p *publisher) close(ctx context.Context) error {
	close(p.closing)
	select {
	case <-p.done:
	case <-ctx.Done():
	}
	return nil
}

func (p *publisher) run() {
	defer close(p.done)
	var client *ttrpc.Client
	defer func() {
		if client != nil {
			client.Close()
		}
	}()
	for {
		var e *types.Envelope
		select {
		case e = <-p.queue:
		default:
			select {
			case e = <-p.queue:
			case <-p.closing:
				select {
				case e = <-p.queue:
				default:
					return
				}
			}
		}
		client = p.deliver(client, e)
	}
}

// deliver forwards one event and returns the client to go on with. While the
// publisher closes, one attempt is all there is.
func (p *publisher) deliver(client *ttrpc.Client, e *types.Envelope) *ttrpc.Client {
	for wait := publishFirst; ; wait = min(2*wait, publishMax) {
		var err error
		if client == nil {
			client, err = p.dial()
		}
		if err == nil {
			ctx, cancel := context.WithTimeout(context.Background(), forwardLimit)
			_, err = events.NewTTRPCEventsClient(client).Forward(ctx, &events.ForwardRequest{Envelope: e})
			cancel()
			if err == nil {
				return client
			}
			client.Close()
			client = nil
		}
		p.log.Debug("event not delivered yet", "topic", e.Topic, "error", err)
		select {
		case <-time.After(wait):
		case <-p.closing:
			return nil
		}
	}
}

func (p *publisher) dial() (*ttrpc.Client, error) {
	c, err := net.DialTimeout("unix", p.address, forwardLimit)
	if err != nil {
		return nil, err
	}
	return ttrpc.NewClient(c), nil
}
