// SPDX-License-Identifier: Apache-2.0

// Package channel carries the streams between a host and its guest over one
// byte stream, such as a virtio-serial port, for machines that cannot have a
// vsock device: QEMU does not save a machine that holds vhost-user-vsock. Both
// ends use it. Streams are those of yamux; ports, refusals and source ports are
// those of vsock, so that what speaks over vsock speaks over this.
//
// # The opening
//
//	guest → host   Greeting, 8 bytes, once it serves
//	host → guest   Hello, HelloSize bytes: what a guest must know before it goes on
//	guest → host   Ack, 8 bytes, once it has done what Hello says
//
// A machine may be saved between Greeting and Hello. The host of a machine
// that was restored sends Hello and gets no Greeting. After Ack both ends speak
// yamux, the host as its client.
//
// # Its end and the next opening
//
// An end that wants the streams to end, and not the line, writes a mark of twelve
// bytes after its last frame; the other end answers with its own. The guest then
// greets again. So a guest can be saved with what runs in it: nothing of a session
// is under way, and the next hello may come from another host.
//
// # A stream
//
// Who opens one writes eight bytes: the port that it dials and its own, 32
// bits each, little endian. The other end answers one byte: 0, or the errno of
// Linux that says why not, after which it ends the stream.
//
// # Trust
//
// The guest is hostile. It can open maxStreams streams, of which no more than
// backlog wait to be accepted on each port, and make the host hold at most
// window bytes for each stream. A wrong frame ends the channel and nothing else,
// and so does an end of the session that the host has not asked for.
package channel
