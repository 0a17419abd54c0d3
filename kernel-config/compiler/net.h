/* The same for network code. */
#include "common.h"
#include <linux/skbuff.h>
#include <linux/netdevice.h>
#include <linux/rtnetlink.h>
#include <net/sock.h>
#include <net/net_namespace.h>
#include <net/ip.h>
#include <net/netlink.h>
