// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/anypb"
)

// markTopic is that of the events by which a subscriber finds out that it is one.
const markTopic = "/e2e/mark"

// connect is a connection to containerd's own API, with its namespace in the
// context of every call.
func (b *box) connect() *grpc.ClientConn {
	b.Helper()
	name := metadata.Pairs("containerd-namespace", b.c.Namespace())
	conn, err := grpc.NewClient("unix://"+b.c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return call(metadata.NewOutgoingContext(ctx, name), method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, call grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return call(metadata.NewOutgoingContext(ctx, name), desc, cc, method, opts...)
		}))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	return conn
}

// tasks is containerd's task service.
func (b *box) tasks() tasksapi.TasksClient {
	b.Helper()
	return tasksapi.NewTasksClient(b.connect())
}

// subscription receives containerd's events about tasks.
type subscription struct {
	*testing.T
	got chan *types.Envelope
}

// subscribe returns when every event from now on will be received.
func (b *box) subscribe() *subscription {
	b.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	client := eventsapi.NewEventsClient(b.connect())
	stream, err := client.Subscribe(ctx, &eventsapi.SubscribeRequest{Filters: []string{`topic~="^/tasks/"`, `topic=="` + markTopic + `"`}})
	if err != nil {
		b.Fatal(err)
	}
	s := &subscription{b.T, make(chan *types.Envelope, 1000)}
	marked, failed, done := make(chan struct{}), make(chan error, 1), make(chan struct{})
	go func() {
		defer close(done)
		for {
			e, err := stream.Recv()
			switch {
			case err != nil:
				failed <- err
				return
			case e.Topic != markTopic:
				s.got <- e
			case marked != nil:
				close(marked)
				marked = nil
			}
		}
	}()
	b.Cleanup(func() { cancel(); <-done })
	// Nothing tells a subscriber when it has become one, but its first event.
	mark, err := anypb.New(&events.NamespaceCreate{Name: "mark"})
	if err != nil {
		b.Fatal(err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit, wait := time.After(callTimeout), marked; ; {
		if _, err := client.Publish(ctx, &eventsapi.PublishRequest{Topic: markTopic, Event: mark}); err != nil {
			b.Fatal(err)
		}
		select {
		case <-wait:
			return s
		case <-tick.C:
		case err := <-failed:
			b.Fatal(err)
		case <-limit:
			b.Fatal("the subscription does not begin")
		}
	}
}

// until reads on until the event on topic of a container, and returns the topics of
// all its events that came, that one included.
func (s *subscription) until(container, topic string) []string {
	s.Helper()
	var topics []string
	for {
		e := receive(s.T, fmt.Sprintf("event %s of %s after %v", topic, container, topics), s.got)
		id, detail := subject(s.T, e)
		if id != container {
			continue
		}
		topics = append(topics, detail)
		if e.Topic == topic {
			return topics
		}
	}
}

// want compares the topics of a container's events, in their order.
func (s *subscription) want(container string, topics ...string) {
	s.Helper()
	if got := s.until(container, "/tasks/delete"); !slices.Equal(got, topics) {
		s.Errorf("events of %s:\n got %v\nwant %v", container, got, topics)
	}
}

// subject is the container that a task event is about, and the event in words:
// its topic, for an exit also whose and how.
func subject(t *testing.T, e *types.Envelope) (container, detail string) {
	t.Helper()
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		t.Fatal(err)
	}
	if x, ok := v.(*events.TaskExit); ok {
		who := "exec"
		if x.ID == x.ContainerID {
			who = "init"
		}
		return x.ContainerID, fmt.Sprintf("%s %s %d", e.Topic, who, x.ExitStatus)
	}
	data, err := json.Marshal(v)
	var names struct {
		ContainerID string `json:"container_id"`
	}
	if err == nil {
		err = json.Unmarshal(data, &names)
	}
	if err != nil {
		t.Fatal(err)
	}
	return names.ContainerID, e.Topic
}
