package network

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"millrace.dev/e2e/cluster/plan"
)

// Plug says whether the node's cable is in or out. While it is out nothing leaves or enters the machine, not even the news that a connection
// has ended.
func Plug(controlPid, number int, in bool) error {
	return within(controlPid, func(control *netlink.Handle) error {
		link, err := control.LinkByName(plan.Node(number))
		if err != nil {
			return fmt.Errorf("%s has no cable: %w", plan.Node(number), err)
		}
		if in {
			return control.LinkSetUp(link)
		}
		return control.LinkSetDown(link)
	})
}

// Plugged tells whether the node's cable is in.
func Plugged(controlPid, number int) bool {
	in := false
	_ = within(controlPid, func(control *netlink.Handle) error {
		link, err := control.LinkByName(plan.Node(number))
		in = err == nil && link.Attrs().Flags&net.FlagUp != 0
		return err
	})
	return in
}

// Part says whether two machines, given by process and number (0 is the control machine), reach each other. Each drops what it would send to the
// other one, silently; the ways to all others stay.
func Part(pid, number, otherPid, otherNumber int, apart bool) error {
	if err := drop(pid, otherNumber, apart); err != nil {
		return err
	}
	return drop(otherPid, number, apart)
}

func drop(pid, other int, dropped bool) error {
	return within(pid, func(handle *netlink.Handle) error {
		machine := &netlink.Route{Dst: hostOf(other), Type: unix.RTN_BLACKHOLE}
		if !dropped {
			// It need not be there.
			_ = handle.RouteDel(machine)
		} else if err := handle.RouteReplace(machine); err != nil {
			return fmt.Errorf("route to %s: %w", machine.Dst, err)
		}
		if other == 0 {
			return nil // it has no pods
		}
		return handle.RouteReplace(podRoute(other, dropped))
	})
}

// Parted are the machines that what this one sends is not for.
func Parted(pid int) []string {
	var names []string
	_ = within(pid, func(handle *netlink.Handle) error {
		for number := 0; number <= plan.NodesMax; number++ {
			filter := &netlink.Route{Dst: hostOf(number), Type: unix.RTN_BLACKHOLE}
			routes, err := handle.RouteListFiltered(netlink.FAMILY_V4, filter, netlink.RT_FILTER_DST|netlink.RT_FILTER_TYPE)
			if err != nil {
				return err
			}
			if len(routes) > 0 {
				names = append(names, plan.Machine(number))
			}
		}
		return nil
	})
	return names
}

func hostOf(number int) *net.IPNet {
	return &net.IPNet{IP: net.ParseIP(plan.MachineAddress(number)), Mask: net.CIDRMask(32, 32)}
}
